"""The README of an output directory: its code runs as it stands."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit, modules
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
    get_peft_model_state_dict,
)
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from loftq_cli import schema
from loftq_cli.checks.written.inputs import inputs_of
from loftq_cli.checks.written.passes import run_through
from loftq_cli.models.auto_classes import auto_class
from loftq_cli.models.spec import DEMO_DIRECTORY
from loftq_cli.report import units
from loftq_cli.report.card import card
from loftq_cli.starts import STARTS
from tests.cli import documents
from tests.conftest import Outcome
from tests.reload import reload, weights
from tests.zoo import ZOO


def blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


def test_load_train_merge_and_evaluate_as_the_readme_says(
    tmp_path: Path, loftq: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--rank", 8, "--iterations", 1, "--lora-alpha", 32)
    assert loftq("quantize", "-o", "out", *options).code == 0
    load, train, merge, head, evaluate = blocks((tmp_path / "out/README.md").read_text())

    names: dict[str, Any] = {"text": "def main():\n    return 0\n"}
    exec(load, names)
    tokens = list(range(20))
    names["train_dataset"] = [{"input_ids": tokens, "labels": tokens}]
    exec(train.replace('"runs", ', '"runs", report_to=[], use_cpu=True, '), names)
    exec(merge, names)
    exec(evaluate, names)
    assert 0 < float(names["loss"].detach()) < 20
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(saved.config, "quantization_config")

    # Merged means: what the 4-bit weight dequantizes to, plus the trained s·B·A, in its dtype.
    untrained = reload(tmp_path / "out")
    name = "transformer.h.1.attn.c_proj"
    adapter = names["model"].base_model.model.get_submodule(name)
    A, B = adapter.lora_A["default"].weight, adapter.lora_B["default"].weight
    expected = untrained.dequantized[name] + 4 * (B.double() @ A.double()).detach()
    merged = saved.get_submodule(name).weight.detach().T  # a Conv1D again
    assert merged.dtype == torch.bfloat16
    error = (merged.double() - expected).abs().max() / expected.abs().max()
    assert float(error) < 2**-7

    # A fresh head on the same layers with the same adapters, trained and saved with them.
    exec(head, names)
    classifier = names["classifier"]
    inputs = torch.tensor([tokens])
    classifier(input_ids=inputs, labels=torch.tensor([1])).loss.backward()
    assert classifier.base_model.model.score.modules_to_save["default"].weight.grad.any()
    module = classifier.base_model.model.get_submodule(name)
    started = untrained.model.base_model.model.get_submodule(name)
    for which in ("lora_A", "lora_B"):
        found = getattr(module, which)["default"].weight
        assert torch.equal(found, getattr(started, which)["default"].weight)
        assert found.grad is not None
    classifier.save_pretrained("trained-classifier")
    monkeypatch.chdir(tmp_path.parent)
    again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "trained-classifier")
    assert torch.equal(again.eval()(inputs).logits, classifier.eval()(inputs).logits)


@pytest.mark.parametrize(
    ("name", "kind", "task"),
    [
        ("Llama", "Sequence", "SEQ_CLS"),
        ("Llama", "Token", "TOKEN_CLS"),
        ("OPT", "Sequence", "SEQ_CLS"),
    ],
)
def test_another_head_gets_the_same_adapters(
    name: str,
    kind: str,
    task: str,
    tmp_path: Path,
    loftq: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model_class = f"{ZOO[name].model_class.removesuffix('ForCausalLM')}For{kind}Classification"
    monkeypatch.chdir(tmp_path)
    ZOO[name].build().save_pretrained("source")
    outcome = loftq("quantize", "-m", "source", "-o", "out", "--rank", 4, "--iterations", 1)
    assert outcome.code == 0, outcome.err
    names = {"here": tmp_path / "out"}
    head = blocks(Path("out/README.md").read_text())[3]
    exec(head.replace("ForSequence", f"For{kind}").replace("SEQ_CLS", task), names)
    model = names["classifier"]
    assert type(model.get_base_model()).__name__ == model_class
    with safe_open("out/loftq_init/adapter_model.safetensors", "pt") as file:
        held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state = get_peft_model_state_dict(model)
    assert all(torch.equal(state[key], tensor) for key, tensor in held.items())
    done = run_through(model, auto_class(model.get_base_model()), device="cpu")
    assert (done.reached, done.notes) == (len(held) // 2, [])
    heads = [key for key in state if key not in held]
    assert heads
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            assert parameter.grad is not None


@pytest.fixture
def demo(
    tmp_path: Path, loftq: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """What the code under "Load" makes of the demo model, in `out`, and then from elsewhere."""
    monkeypatch.chdir(tmp_path)
    assert loftq("quantize", "-o", "out", "--rank", 4, "--init", "pissa",
                 "--iterations", 1).code == 0  # fmt: skip
    names: dict[str, Any] = {}
    exec(blocks(Path("out/README.md").read_text())[0], names)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    return names


def test_what_was_trained_is_found_and_saved_from_any_folder(
    demo: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resized embeddings too, which PEFT saves where it can hold them against the backbone."""
    load = blocks((tmp_path / "out/README.md").read_text())[0]
    before, line, after = load.partition("model = PeftModel")
    resized = f"{before}model.resize_token_embeddings(len(tokenizer))\n{line}{after}"
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained("out")
    tokenizer.add_tokens(["<new>"])
    names: dict[str, Any] = {"tokenizer": tokenizer}
    exec(resized, names)
    monkeypatch.chdir("elsewhere")
    model = names["model"]
    tokens = torch.tensor([[5, 6, len(tokenizer) - 1, 7]])
    model(input_ids=tokens, labels=tokens).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    with pytest.warns(UserWarning, match="the embedding layer has been resized"):
        model.save_pretrained("trained")
    tokenizer.save_pretrained("trained")
    with safe_open("trained/adapter_model.safetensors", "pt") as file:
        saved = {name for name in file.keys() if "lora_" not in name}  # noqa: SIM118
    assert "base_model.model.transformer.wte.weight" in saved
    Path("further").mkdir()
    monkeypatch.chdir("further")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "elsewhere" / "trained")
    assert torch.equal(again.eval()(tokens).logits, model.eval()(tokens).logits)


def test_a_pipeline_of_the_directory_has_no_adapter_and_one_of_the_model_has(
    demo: dict[str, Any],
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo["here"])
    alone = transformers.pipeline("text-generation", model=str(demo["here"]))
    assert not any("lora_" in name for name, _ in alone.model.named_parameters())
    whole = transformers.pipeline("text-generation", model=demo["model"], tokenizer=tokenizer)
    tokens = torch.arange(12)[None] + 5
    with torch.no_grad():
        expected = demo["model"].eval()(tokens).logits
        assert torch.equal(whole.model(tokens).logits, expected)
        with demo["model"].disable_adapter():
            assert torch.equal(demo["model"](tokens).logits, alone.model(tokens).logits)
        assert not torch.allclose(alone.model(tokens).logits, expected, atol=0.1)


def test_a_reference_is_the_untrained_adapter_a_second_time(demo: dict[str, Any]) -> None:
    model, tokens = demo["model"], torch.arange(12)[None] + 5
    with torch.no_grad():
        expected = model.eval()(tokens).logits
        model.load_adapter(demo["here"], "reference", subfolder="loftq_init")
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter.add_(0.1)
        assert not torch.allclose(model(tokens).logits, expected, atol=0.1)
        model.set_adapter("reference")
        assert torch.equal(model(tokens).logits, expected)


def test_the_backbone_alone_is_as_far_off_as_the_readme_says(
    demo: dict[str, Any], tmp_path: Path
) -> None:
    original = weights(AutoModelForCausalLM.from_pretrained(DEMO_DIRECTORY))
    loaded = reload(tmp_path / "out")
    lost = sum(float((original[name] - Q).square().sum()) for name, Q in loaded.dequantized.items())
    whole = sum(float(original[name].square().sum()) for name in loaded.dequantized)
    text = " ".join((tmp_path / "out/README.md").read_text().split())
    told = f"Without it the quantized weights are {units.percent((lost / whole) ** 0.5)} off"
    assert told in text


def test_the_order_is_safe_where_bitsandbytes_rearranges_weights(
    tmp_path: Path, loftq: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CPU with native bfloat16: an evaluation first, then training, then another."""
    monkeypatch.chdir(tmp_path)
    ZOO["Llama"].build().save_pretrained("source")
    assert loftq("quantize", "-m", "source", "-o", "out", "--rank", 4).code == 0
    load, train, merge, *_ = blocks(Path("out/README.md").read_text())
    tokens = torch.arange(12)[None] + 5
    example = {"input_ids": tokens[0], "labels": tokens[0]}
    train = train.replace('"runs", ', '"runs", report_to=[], use_cpu=True, ')
    found = []
    for native in (False, True):
        monkeypatch.setattr(modules, "has_avx512bf16", lambda native=native: native)
        names: dict[str, Any] = {"train_dataset": [example] * 4}
        exec(load, names)
        with torch.no_grad():
            before = names["model"].eval()(tokens).logits
        exec(train, names)
        exec(merge, names)
        with torch.no_grad():
            after = names["model"].eval()(tokens).logits
            found.append([before, after, names["merged"].eval()(tokens).logits])
    assert Linear4bit(64, 64).support_avx512bf16_for_cpu
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert not torch.equal(found[0][0], found[0][1])


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float16, torch.float32])
def test_only_the_stored_dtype_runs(demo: dict[str, Any], dtype: Any) -> None:
    """The demo is stored in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(demo["here"], dtype=dtype)
    model = PeftModel.from_pretrained(model, demo["here"], subfolder="loftq_init")
    tokens = torch.arange(12)[None] + 5
    with torch.no_grad():
        if dtype in ("auto", torch.bfloat16):
            assert torch.equal(model(tokens).logits, demo["model"].eval()(tokens).logits)
        else:
            with pytest.raises(RuntimeError, match="expected scalar type"):
                model(tokens)


@pytest.mark.parametrize(
    "name",
    [
        "LLaVA",
        "Whisper",
        "BERT, classifier",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("BERT to BERT", "Wav2Vec2, CTC", "T5")
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning")
def test_every_block_runs_for_models_of_other_kinds(
    name: str, tmp_path: Path, loftq: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ZOO[name].build().save_pretrained("source")
    outcome = loftq("quantize", "-m", "source", "-o", "out", "--rank", 4, "--iterations", 1)
    assert outcome.code == 0, outcome.err
    load, train, merge = blocks(Path("out/README.md").read_text())
    names: dict[str, Any] = {}
    exec(load, names)
    model = names["model"]
    inputs = inputs_of(model.get_base_model(), auto_class(model.get_base_model()))
    given = {**inputs.tensors, **inputs.labels}
    names["train_dataset"] = [{key: value[0] for key, value in given.items()}]
    before = {key: value.clone() for key, value in model.state_dict().items() if "lora_B" in key}
    exec(train.replace('"runs", ', '"runs", report_to=[], use_cpu=True, '), names)
    after = model.state_dict()
    moved = sum(not torch.equal(after[key], value) for key, value in before.items())
    assert moved == len(before) - {"LLaVA": 6, "BERT to BERT": 1}.get(name, 0)

    exec(merge, names)
    opener = getattr(transformers, auto_class(model.get_base_model()))
    merged = opener.from_pretrained("merged").eval()
    assert type(merged) is type(model.get_base_model())
    assert not hasattr(merged.config, "quantization_config")
    with torch.no_grad():
        expected, found = model.eval()(**given), merged(**given)
    for key in ("logits", "loss"):
        torch.testing.assert_close(found[key], expected[key], atol=1e-4, rtol=1e-4)


def test_eight_bits_say_what_little_there_is_to_gain(
    tmp_path: Path, loftq: Callable[..., Outcome]
) -> None:
    options = ("--bits", 8, "--rank", 2, "--iterations", 1)
    outcome = loftq("quantize", "-o", tmp_path / "out", *options)
    assert "activations" in outcome.err
    assert "activations" in (tmp_path / "out/README.md").read_text()


def card_of(**changes: Any) -> str:
    """The card of a calibrated sample with other settings."""
    data = copy.deepcopy(documents.ALL["quantize-calibrated"])
    data["results"]["settings"] |= changes
    return " ".join(card(schema.document_of(data)).split())


def test_ranks_that_differ_are_no_matter_but_for_sglang() -> None:
    text = card_of()
    assert "NF4/NF2, 3.24 bits on average (blocks of 64, double quantization)" in text
    assert "a LoRA adapter of ranks 4 to 40." in text
    assert "--max-lora-rank 64" in text
    assert "SGLang ignores rank patterns and alpha patterns, and would" in text
    assert "write the directory with `--uniform-rank`." in text
    assert "3.46 bits of information a weight, stored in 4.13" in text
    assert "| weight error | 9.36 % → 7.02 % with the adapter (25.0 % of it removed) |" in text
    assert "| output error | 5.00 % → 2.00 % with the adapter (60.0 % of it removed) |" in text
    assert "calibration text (4,096 tokens)" in text


@pytest.mark.parametrize(
    ("rank", "told"),
    [
        (1, "`--max-lora-rank 1`"),
        (9, "`--max-lora-rank 16`"),
        (257, "`--max-lora-rank 320`"),
        (512, "`--max-lora-rank 512`"),
        (513, "but no adapter of a rank above 512."),
    ],
)
def test_vllm_takes_some_ranks(rank: int, told: str) -> None:
    data = copy.deepcopy(documents.ALL["quantize"])
    for layer in data["results"]["layers"]:
        layer["rank"] = rank
    text = " ".join(card(schema.document_of(data)).split())
    assert told in text
    assert "vllm-bnb-plugin" in text
    assert "SGLang" not in text
    data["results"]["settings"]["rslora"] = True
    text = " ".join(card(schema.document_of(data)).split())
    assert "SGLang ignores rsLoRA, and would" in text
    assert "without `--rslora`." in text


def test_padded_ranks_are_one_for_sglang() -> None:
    data = copy.deepcopy(documents.ALL["quantize-calibrated"])
    for layer in data["results"]["layers"]:
        layer["stored_rank"] = 64
    text = " ".join(card(schema.document_of(data)).split())
    assert "ranks 4 to 40, padded to 64 where B is zero." in text
    assert "--max-lora-rank 64`" in text
    assert "SGLang" not in text


@pytest.mark.parametrize("init", STARTS)
def test_every_start_is_named(init: str) -> None:
    text = card_of(init=init)
    assert f"The adapter {STARTS[init].sentence}." in text
    assert ("Keep its dropout at 0" in text) == (init not in ("qlora", "lora"))


def test_what_was_not_quantized_is_loaded_and_merged_like_any_model(
    tmp_path: Path, loftq: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = loftq("quantize", "-o", "out", "--rank", 2, "--init", "lora", "--format", "table")
    assert outcome.code == 0, outcome.err
    assert "demo in 16 bits (LoRA) with a rank-2 adapter" in outcome.out
    assert "weight error" not in outcome.out
    text = (tmp_path / "out/README.md").read_text()
    assert "its weights as they were" in text
    for word in ("quantiz", "dequantize", "nf4", "error"):
        assert word not in text.lower()
    load, _, merge, _, _ = blocks(text)
    names: dict[str, Any] = {}
    exec(load, names)
    names["model"].save_pretrained("trained-adapter")
    exec(merge, names)
    merged = AutoModelForCausalLM.from_pretrained("merged").state_dict()
    original = AutoModelForCausalLM.from_pretrained(DEMO_DIRECTORY).state_dict()
    assert all(torch.equal(merged[name], each) for name, each in original.items())


def test_an_error_that_grew_and_one_that_is_not_there() -> None:
    assert units.error_change(0.08, 0.09) == "8.00 % → 9.00 % with the adapter (12.5 % more)"
    assert units.error_change(0.0, 0.0) == "0 % → 0 % with the adapter (0 % of it removed)"


@pytest.mark.parametrize(
    "name",
    [
        "a`b",
        "```",
        "[x](y)",
        "<b>",
        "q'u\"o",
        "new\n# line\n```",
        "\x1b[31m",
        "\u202egpj",
        "\x7f\\",
        "é",
    ],
)
def test_names_that_say_more_than_a_name(name: str, tmp_path: Path) -> None:
    document = schema.document_of(copy.deepcopy(documents.ALL["quantize"]))
    named = document.model_copy(
        update={
            "model": schema.ModelIdentity(id=f"/tmp/{name}", source="directory"),
            "results": document.results.model_copy(update={"output": str(tmp_path / name)}),
        }
    )
    text = card(named)
    assert all(line.isprintable() for line in text.split("\n"))
    plain = card(document)
    assert text.startswith("# ")
    assert text.count("\n") == plain.count("\n"), "a name has lines of its own"
    found: dict[str, Any] = {}
    (line,) = re.findall(r"^here = .*$", text, flags=re.MULTILINE)
    exec(f"from pathlib import Path\n{line}", found)
    assert found["here"] == Path(name).resolve()
    fence = re.compile(r"^```[^`]*$", re.MULTILINE)
    assert len(fence.findall(text)) == len(fence.findall(plain))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("init", sorted(STARTS))
def test_the_learning_rate_is_that_of_the_start(init: str, bits: int) -> None:
    content = documents.quantize()
    content["results"]["settings"] |= {"init": init, "bits": bits}
    content["results"] |= {"auto_class": "AutoModelForCausalLM", "task_type": "CAUSAL_LM"}
    text = card(schema.load_document(json.dumps(content)))
    halved = bits <= STARTS[init].half_rate_up_to
    assert f"learning_rate={'1e-4' if halved else '2e-4'}, num_train_epochs=1" in text
    assert ("half of that is for this start" in text) is halved
    assert "finds `loftq compare" in text
    content["results"] |= {"auto_class": "AutoModelForSequenceClassification"}
    assert "finds `loftq compare" not in card(schema.load_document(json.dumps(content)))
