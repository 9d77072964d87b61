"""The pass through a loaded directory: inputs of each kind, labels, gradients on all adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

from loftq_cli.checks.written.inputs import inputs_of
from loftq_cli.checks.written.passes import run_through
from loftq_cli.errors import CheckFailed
from loftq_cli.models.adapters import attach_fresh
from loftq_cli.models.auto_classes import auto_class, task_type
from tests.battery import BERT_LIKE, LLAMA_LIKE
from tests.verify.conftest import Loftq, edit_json, edit_report, reseal, run_verify, statuses
from tests.zoo import ZOO

VISION = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
IMAGE = {"pixel_values", "input_ids", "attention_mask"}


def wrapped(model: Any, targets: str | list[str] = "all-linear") -> tuple[Any, str]:
    auto = auto_class(model)
    return attach_fresh(model, 2, task_type(auto, model), targets).eval(), auto


@pytest.mark.parametrize(
    ("name", "tensors", "labels", "without"),
    [
        ("Llama", {"input_ids", "attention_mask"}, {"labels": (1, 8)}, 0),
        ("T5", {"input_ids", "attention_mask", "decoder_input_ids"}, {"labels": (1, 5)}, 0),
        ("BERT to BERT", {"input_ids", "attention_mask", "decoder_input_ids"},
         {"labels": (1, 5)}, 1),  # the encoder's pooler gives what nobody uses
        ("BART, classifier", {"input_ids", "attention_mask"}, {"labels": (1,)}, 0),
        ("BERT, embeddings", {"input_ids", "attention_mask"}, {}, 0),
        ("ViT, classifier", {"pixel_values"}, {"labels": (1,)}, 0),
        ("LLaVA", IMAGE, {"labels": (1, 24)}, 6),  # it takes its image before the last layer
        ("Qwen2-VL", {*IMAGE, "image_grid_thw", "mm_token_type_ids"}, {"labels": (1, 12)}, 0),
        ("Whisper", {"input_features", "decoder_input_ids"}, {"labels": (1, 5)}, 0),
        ("Speech2Text", {"input_features", "decoder_input_ids"}, {"labels": (1, 5)}, 0),
        ("Wav2Vec2, CTC", {"input_values"}, {"labels": (1, 3)}, 0),
    ],
)  # fmt: skip
def test_inputs_and_labels(
    name: str, tensors: set[str], labels: dict[str, Any], without: int
) -> None:
    model, auto = wrapped(ZOO[name].build())
    done = run_through(model, auto, device="cpu")
    assert set(done.inputs.tensors) == tensors
    assert {key: tuple(each.shape) for key, each in done.inputs.labels.items()} == labels
    adapters = sum(hasattr(module, "lora_A") for module in model.modules())
    assert (done.values > 0, adapters - done.reached) == (True, without)
    assert len(done.notes) == (without > 0)


@pytest.mark.parametrize(
    ("name", "settings", "labels"),
    [
        ("BertForSequenceClassification", {"num_labels": 3}, torch.long),
        ("BertForSequenceClassification", {"num_labels": 1}, torch.float32),
        ("BertForSequenceClassification",
         {"num_labels": 3, "problem_type": "multi_label_classification"}, torch.float32),
        ("BertForMultipleChoice", {}, torch.long),
        ("BertForTokenClassification", {"num_labels": 5}, torch.long),
        ("BertForQuestionAnswering", {}, torch.long),
        ("BertForNextSentencePrediction", {}, torch.long),
        ("BertForPreTraining", {}, torch.long),
        ("BertForMaskedLM", {}, torch.long),
    ],
)  # fmt: skip
def test_heads_give_a_loss(name: str, settings: dict[str, Any], labels: torch.dtype) -> None:
    model, auto = wrapped(getattr(t, name)(t.BertConfig(**BERT_LIKE, **settings)), ["query"])
    done = run_through(model, auto, device="cpu")
    assert {each.dtype for each in done.inputs.labels.values()} == {labels}
    assert done.notes == []
    outputs = model(**done.inputs.on("cpu", torch.float32))
    assert bool(outputs.loss.isfinite())


@pytest.mark.parametrize(
    ("model", "tensor", "shape"),
    [
        (lambda: t.VideoMAEForVideoClassification(t.VideoMAEConfig(**VISION, num_frames=4)),
         "pixel_values", (1, 4, 3, 32, 32)),
        (lambda: t.MoonshineForConditionalGeneration(t.MoonshineConfig(
            vocab_size=96, hidden_size=64, intermediate_size=64, encoder_num_hidden_layers=1,
            decoder_num_hidden_layers=1, encoder_num_attention_heads=2,
            decoder_num_attention_heads=2)), "input_values", (1, 16_000)),
        (lambda: t.LlavaNextForConditionalGeneration(t.LlavaNextConfig(
            text_config={"model_type": "llama", **LLAMA_LIKE}, image_token_index=90,
            vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 64},
            image_grid_pinpoints=[[32, 32], [64, 32]])), "pixel_values", (1, 2, 3, 32, 32)),
    ],
    ids=["video", "waveform", "tiles"],
)  # fmt: skip
def test_forms_of_images_and_sounds(model: Any, tensor: str, shape: tuple[int, ...]) -> None:
    done = run_through(*wrapped(model()), device="cpu")
    assert tuple(done.inputs.tensors[tensor].shape) == shape
    assert not any(note.startswith("not run") for note in done.notes)


def test_special_tokens_stand_for_nothing() -> None:
    """Nothing of the text is an image, a start or padding, and a loss asks for none of them."""
    model = ZOO["LLaVA"].build()
    inputs = inputs_of(model, "AutoModelForImageTextToText")
    image = inputs.tensors["input_ids"] == model.config.image_token_id
    assert int(image.sum()) == 16
    assert torch.equal(inputs.labels["labels"] == -100, image)
    text = inputs_of(model, "AutoModelForImageTextToText", images=False).tensors
    assert set(text) == {"input_ids", "attention_mask"}


def test_an_image_that_the_model_does_not_take_is_said_not_to_be_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise ValueError("three tiles, please")

    for when in ("get_image_features", "forward"):
        model = ZOO["LLaVA"].build()
        monkeypatch.setattr(model.model.vision_tower, "forward", refuses)
        if when == "forward":  # it is counted, and then not taken
            features = torch.zeros(16, 64)
            monkeypatch.setattr(
                model, "get_image_features", lambda features=features, **_: features
            )
        done = run_through(*wrapped(model), device="cpu")
        assert done.notes[0] == "not run: images (ValueError: three tiles, please)"
        assert "to which no input went, such as model.vision_tower" in done.notes[1]
        assert done.reached == 14


class Past(torch.nn.Module):
    """An MLP that reads a weight instead of calling its layer."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.up_proj, self.down_proj = mlp.up_proj, mlp.down_proj

    def forward(self, x: torch.Tensor) -> Any:
        return self.down_proj(x @ self.up_proj.weight.T)


def test_an_adapter_that_the_model_goes_past_is_found() -> None:
    model = t.LlamaForCausalLM(t.LlamaConfig(**LLAMA_LIKE))
    model.model.layers[1].mlp = Past(model.model.layers[1].mlp)
    with pytest.raises(CheckFailed, match=r"layers\.1\.mlp\.up_proj takes no part"):
        run_through(*wrapped(model), device="cpu")


def test_a_layer_that_no_input_needs_is_told() -> None:
    config = t.BartConfig(**ZOO["BART"].config)
    done = run_through(*wrapped(t.BartForCausalLM(config)), device="cpu")
    (note,) = done.notes
    assert note.startswith("without gradient: 8 adapters of layers to which no input went")
    assert note.endswith("encoder_attn.k_proj")


def test_a_gradient_that_is_no_number_is_found() -> None:
    class Root(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + (x * 0).sqrt()  # whose derivative there is infinity times zero

    model = t.LlamaForCausalLM(t.LlamaConfig(**LLAMA_LIKE))
    model.model.layers[1].mlp.act_fn = Root()
    with pytest.raises(CheckFailed, match=r"gradient of the adapter of .* is NaN"):
        run_through(*wrapped(model), device="cpu")


@pytest.mark.parametrize("name", ["Whisper", "BERT to BERT"])
def test_a_written_directory_of_another_kind(name: str, tmp_path: Path, loftq: Loftq) -> None:
    """And one whose task type PEFT cannot call the model by, as it used to be written."""
    ZOO[name].build(dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    out = tmp_path / "out"
    done = loftq("quantize", "-m", tmp_path / "source", "-o", out, "--rank", 4, "--verify",
                 "--iterations", 1, "--json")  # fmt: skip
    assert done.code == 0, done.err
    results = json.loads(done.out)["results"]
    assert results["auto_class"] == auto_class(ZOO[name].build())
    outcome, found = run_verify(loftq, out)
    assert outcome.code == 0, outcome.err
    assert set(statuses(found).values()) == {"passed"}
    notes = found["tests"][-1]["notes"]
    page = loftq("verify", out, "--format", "table").out
    for note in notes:
        assert f"verify: forward: {note}" in done.err
        assert note.split(",")[0] in " ".join(page.split())
    assert bool(notes) == (name == "BERT to BERT")

    if name == "Whisper":
        edit_report(out, lambda report: report.update(task_type="SEQ_2_SEQ_LM"))
        config = out / "loftq_init" / "adapter_config.json"
        edit_json(config, lambda config: config.update(task_type="SEQ_2_SEQ_LM"))
        reseal(out)
        outcome, found = run_verify(loftq, out)
        assert (outcome.code, statuses(found)["forward"]) == (3, "failed")
        assert "TypeError" in found["tests"][-1]["cause"]


def test_code_that_comes_with_the_checkpoint(
    source: Path, tmp_path: Path, loftq: Loftq, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README asks for consent where the user has to give it, and so does verify."""
    (source / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_to_verify'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    auto_map = {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    named = {"model_type": "own_to_verify", "architectures": ["OwnForCausalLM"]}
    edit_json(source / "config.json", lambda config: config.update(named, auto_map=auto_map))
    out, consent = tmp_path / "own", "--trust-remote-code"
    done = loftq("quantize", "-m", source, "-o", out, "--rank", 4, "--iterations", 1, consent)
    assert done.code == 0, done.err
    outcome, results = run_verify(loftq, out, consent)
    assert outcome.code == 0, outcome.err
    assert statuses(results)["forward"] == "passed"
    assert run_verify(loftq, out)[0].code == 3
    text = (out / "README.md").read_text()
    assert "AutoModelForCausalLM.from_pretrained(here, trust_remote_code=True)" in text
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(text.partition("```python\n")[2].partition("```")[0], names)
    assert type(names["model"].get_base_model()).__name__ == "OwnForCausalLM"


def test_inputs_of_which_nothing_is_known_are_no_pass(
    written: Path, loftq: Loftq, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(t.LlamaForCausalLM, "main_input_name", "spectrogram")
    outcome, results = run_verify(loftq, written)
    assert (outcome.code, statuses(results)["forward"]) == (3, "failed")
    assert "not run: nothing is known about the inputs of LlamaForCausalLM" in outcome.err
    assert "it asks for spectrogram" in outcome.err


def test_inputs_that_the_config_does_not_describe_are_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What fails while inputs are made says nothing of the model, which was not run."""
    model = t.LlamaForCausalLM(t.LlamaConfig(**LLAMA_LIKE))
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda input_ids=None, past_values=None: forward(input_ids)
    )
    monkeypatch.setattr(t.LlamaForCausalLM, "main_input_name", "past_values")
    with pytest.raises(CheckFailed, match="nothing is known about the inputs") as caught:
        run_through(*wrapped(model), device="cpu")
    assert "context_length" in caught.value.cause


def test_a_class_that_is_no_model_is_not_called(written: Path, loftq: Loftq) -> None:
    edit_report(written, lambda report: report.update(auto_class="Trainer"))
    config = written / "loftq_init" / "adapter_config.json"
    edit_json(config, lambda adapter: adapter["auto_mapping"].update(base_model_class="Trainer"))
    reseal(written)
    outcome, results = run_verify(loftq, written)
    assert (outcome.code, statuses(results)["forward"]) == (3, "failed")
    assert "no model class Trainer" in outcome.err
