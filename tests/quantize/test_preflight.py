"""What the loading libraries are asked before a weight is read, and what follows from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from loftq_cli.checkpoint.index import open_checkpoint
from loftq_cli.engines import objections
from loftq_cli.engines.preflight import Asked, ask
from loftq_cli.engines.settings import Settings
from loftq_cli.errors import LoftqError, UnsupportedModel
from loftq_cli.models import architecture, layers
from loftq_cli.models.source import read_config
from tests.conftest import Outcome
from tests.zoo import ZOO

Loftq = Callable[..., Outcome]


def saved(name: str, directory: Path, **config: Any) -> Path:
    entry = ZOO[name]
    replace(entry, config={**entry.config, **config}).build().save_pretrained(directory)
    return directory


def asked(directory: Path, **settings: Any) -> Asked:
    checkpoint = open_checkpoint(directory)
    wanted = Settings(rank=4, **settings)
    return ask(directory, read_config(directory), checkpoint, wanted, trust_remote_code=False)


def reasons(found: Asked) -> dict[str, set[str]]:
    """Why layers get no adapter and tensors stay as they are, by the ends of their names."""
    told: dict[str, set[str]] = {}
    for planned in found.plan.layers:
        told.setdefault(planned.layer.module.rpartition(".")[2], set()).add(planned.reason)
    for left in found.plan.left:
        name = left.tensor.removesuffix(".weight").rpartition(".")[2]
        told.setdefault(name, set()).add(left.reason)
    return told


def test_what_peft_moves_onto_stacked_experts_gets_no_adapter(tmp_path: Path) -> None:
    found = asked(saved("DeepSeek-V3", tmp_path, moe_intermediate_size=64))
    unadapted = {each.layer.module for each in found.plan.layers if not each.adapted}
    assert unadapted == {
        f"model.layers.{block}.{name}_proj"
        for block in ("0.mlp", "1.mlp.shared_experts")
        for name in ("gate", "up", "down")
    }
    assert {each.reason for each in found.plan.layers} == {"", layers.MOVED}


@pytest.mark.parametrize("target", ["down_proj", "gate_proj", "model.layers.0.mlp.up_proj"])
def test_targets_that_peft_moves_leave_nothing_to_adapt(target: str, tmp_path: Path) -> None:
    """One of the three alone is an error of PEFT's, another moves in silence."""
    saved("DeepSeek-V3", tmp_path)
    with pytest.raises(UnsupportedModel, match="no layer of this model can have an adapter"):
        asked(tmp_path, target_modules=(target,))


def test_names_know_the_models_whose_experts_peft_knows() -> None:
    """PEFT reads transformers' table, which grows."""
    conversion = pytest.importorskip("peft.utils.transformers_weight_conversion")
    table = conversion._MODEL_TO_CONVERSION_PATTERN
    known = {kind for kind, pattern in table.items() if pattern == "qwen2_moe"}
    assert known <= layers._EXPERTS_LIKE_QWEN2
    assert conversion._MOE_TARGET_MODULE_MAPPING["qwen2_moe"].keys() == {
        "gate",
        *layers._MOVED_BY_PEFT,
    }


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("Mamba", {"x_proj", "dt_proj", "out_proj"}),
        ("RWKV", {"output"}),
        ("Switch", set()),  # `wo` is kept in float32 there
        ("WavLM, CTC", {"q_proj", "k_proj", "v_proj", "out_proj"}),
    ],
)
def test_a_weight_that_the_model_reads_itself_stays(
    name: str, ends: set[str], tmp_path: Path
) -> None:
    told = reasons(asked(saved(name, tmp_path)))
    assert {end for end, why in told.items() if layers.READ_DIRECTLY in why} >= ends


def test_a_read_that_the_config_rules_out_does_not_count(tmp_path: Path) -> None:
    usual = asked(saved("BLOOM", tmp_path / "usual"))
    assert layers.READ_DIRECTLY not in reasons(usual)["dense"]
    config = {"pretraining_tp": 2, "slow_but_exact": True}
    slow = reasons(asked(saved("BLOOM", tmp_path / "slow", **config)))
    assert slow["dense"] == slow["dense_4h_to_h"] == {layers.READ_DIRECTLY}


def test_layers_that_peft_refuses_are_found_by_kind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`out_proj` of Mamba, were it not left for another reason."""
    monkeypatch.setattr(layers, "READ_DIRECTLY", None)
    told = reasons(asked(saved("Mamba", tmp_path)))
    (why,) = told["out_proj"]
    assert why.startswith("PEFT refuses it: ")
    assert told["in_proj"] == {""}


def test_a_model_that_is_built_otherwise_when_quantized_is_refused(
    tmp_path: Path, loftq: Loftq
) -> None:
    source = saved("Llama 4", tmp_path / "source")
    line = ("quantize", "-m", source, "-o", tmp_path / "out", "--rank", 4)
    outcome = loftq(*line, "--experts", "keep")
    assert (outcome.code, outcome.out) == (1, "")
    assert "could not load a quantized Llama4ForCausalLM" in outcome.err
    assert objections.IN_16_BITS in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    verified = loftq(*line, "--init", "lora", "--verify")  # as the hint says
    assert verified.code == 0, verified.err


def test_every_head_that_peft_trains_is_kept_and_written(tmp_path: Path, loftq: Loftq) -> None:
    """PEFT takes `pre_classifier` for a classifier, since its name ends like one."""
    source = saved("DistilBERT, classifier", tmp_path / "source")
    found = asked(source)
    assert found.plan.trained_heads == tuple(
        f"{head}.{part}" for head in ("classifier", "pre_classifier") for part in ("bias", "weight")
    )
    outcome = loftq("quantize", "-m", source, "-o", tmp_path / "out", "--rank", 4)
    assert outcome.code == 0, outcome.err
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    adapted = PeftModel.from_pretrained(model, tmp_path / "out", subfolder="loftq_init")
    original = load_file(source / "model.safetensors")
    trained = adapted.get_base_model().pre_classifier.modules_to_save["default"]
    assert torch.equal(trained.weight, original["pre_classifier.weight"])


@pytest.mark.parametrize("settings", [{}, {"bits": 16, "init": "lora"}])
def test_a_head_by_another_name_is_kept_all_the_same(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """PEFT trains what ends like a classifier, whoever calls it a head, and then not in 4 bits."""
    others = [name for name in architecture._HEADS if not name.endswith("classifier")]
    monkeypatch.setattr(architecture, "_HEADS", others)
    found = asked(saved("DistilBERT, classifier", tmp_path, num_labels=32), **settings)
    told = reasons(found)
    assert told["classifier"] == told["pre_classifier"] == {layers.OUTPUT_HEAD}
    assert len(found.plan.trained_heads) == 4


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("Llama", (AutoModel, AutoModelForSequenceClassification)),
        ("BERT", (AutoModel, AutoModelForSequenceClassification)),
        ("BERT, embeddings", (AutoModelForMaskedLM, AutoModelForSequenceClassification)),
        ("DeepSeek-V3", (AutoModel, AutoModelForSequenceClassification)),
    ],
)
def test_other_classes_open_the_directory(
    name: str, classes: tuple[Any, ...], tmp_path: Path, loftq: Loftq
) -> None:
    """A fresh head has no codes to load; without a head the paths have no prefix."""
    source = saved(name, tmp_path / "source", pad_token_id=0)
    outcome = loftq("quantize", "-m", source, "-o", tmp_path / "out", "--rank", 4)
    assert outcome.code == 0, outcome.err
    for opened_by in classes:
        model = opened_by.from_pretrained(tmp_path / "out").eval()
        quantized = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
        assert quantized
        assert all(module.weight.quant_state is not None for module in quantized)
        with torch.no_grad():
            outputs = model(input_ids=torch.arange(3, 12)[None])
        assert bool(next(iter(outputs.values())).isfinite().all())


PLACES = {
    "linear": "model.layers.0.mlp.up_proj.weight",
    "norm": "model.norm.weight",
    "embedding": "model.embed_tokens.weight",
    "head": "lm_head.weight",
}


@pytest.fixture(scope="module")
def in_bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bfloat16")
    ZOO["Llama"].build().to(torch.bfloat16).save_pretrained(directory)
    return directory


def with_one_in(dtype: torch.dtype, place: str, source: Path, directory: Path) -> Path:
    shutil.copytree(source, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors[PLACES[place]] = tensors[PLACES[place]].to(dtype)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_a_tensor_in_another_dtype_is_written_in_one_that_runs(
    dtype: torch.dtype, place: str, in_bfloat16: Path, tmp_path: Path
) -> None:
    """transformers casts a model that it loads, but takes a quantized one as it is stored."""
    found = asked(with_one_in(dtype, place, in_bfloat16, tmp_path / "source"))
    read = {name: info.dtype for name, (_, info) in found.checkpoint.tensors.items()}
    others = {"BF16"} if place != "linear" else {"BF16", "F32" if dtype != torch.float16 else "F16"}
    assert set(read.values()) == others


@pytest.mark.parametrize("place", ["linear", "norm"])
def test_what_was_in_float64_runs(
    place: str, in_bfloat16: Path, tmp_path: Path, loftq: Loftq
) -> None:
    source = with_one_in(torch.float64, place, in_bfloat16, tmp_path / "source")
    line = ("quantize", "-m", source, "-o", tmp_path / "out", "--rank", 4, "--verify")
    outcome = loftq(*line)
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_codes_without_scales_are_refused(
    dtype: torch.dtype, place: str, in_bfloat16: Path, tmp_path: Path, loftq: Loftq
) -> None:
    source = with_one_in(dtype, place, in_bfloat16, tmp_path / "source")
    outcome = loftq("quantize", "-m", source, "-o", tmp_path / "out", "--rank", 4)
    assert outcome.code == 1
    assert f"{PLACES[place]} is stored as " in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("named", ["Trainer", "AutoModel", "LlamaPreTrainedModel", "LlamaConfig"])
def test_only_a_model_class_is_built(named: str, tmp_path: Path, loftq: Loftq) -> None:
    config = json.loads((saved("Llama", tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": [named]}))
    outcome = loftq("quantize", "-m", tmp_path, "-o", tmp_path.parent / "out", "--rank", 4)
    assert outcome.code == 1
    assert f"config.json names ['{named}'] for model type 'llama'" in outcome.err


def test_sizes_may_be_one_for_each_layer(tmp_path: Path) -> None:
    saved("Gemma 3n", tmp_path)
    assert isinstance(read_config(tmp_path)["intermediate_size"], list)
    config = {**read_config(tmp_path), "intermediate_size": [128, 0]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoftqError, match="intermediate_size is out of range"):
        read_config(tmp_path)


@pytest.mark.parametrize("name", ["BERT", "DeepSeek-V3", "DistilBERT, classifier", "Mamba"])
def test_every_command_counts_alike(name: str, tmp_path: Path, loftq: Loftq) -> None:
    """Of names alone it is said that they were all that was looked at."""
    source = saved(name, tmp_path)
    trained = asked(source).plan.trainable_parameters
    for options, counted_by in (((), "names"), (("--preflight",), "class")):
        found = [
            json.loads(loftq(*line, "-m", source, "--json", "-q", *options).out)["results"]
            for line in (
                ("quantize", "--dry-run", "--rank", 4),
                ("targets", "--rank", 4),
                ("sweep-ranks", "--ranks", 4),
            )
        ]
        assert {each["counted_by"] for each in found} == {counted_by}
        everything = next(each for each in found[1]["presets"] if each["name"] == "all-linear")
        assert found[0]["totals"]["trainable_parameters"] == trained
        assert everything["trainable_parameters"] == trained
        assert found[2]["ranks"][0]["trainable_parameters"] == trained


def test_a_preflight_needs_a_config_and_is_for_dry_runs(tmp_path: Path, loftq: Loftq) -> None:
    outcome = loftq("quantize", "-o", tmp_path / "out", "--preflight")
    assert outcome.code == 2
    assert "--preflight is for --dry-run" in outcome.err
