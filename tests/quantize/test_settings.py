"""What each option does to the files, measured on them through bitsandbytes and PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loftq_cli.engines import shards
from tests.battery import BATTERY
from tests.conftest import Outcome
from tests.reload import relative_error, reload, weights

Quantize = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama whose layers are of several shapes, in bfloat16."""
    directory = tmp_path_factory.mktemp("source")
    BATTERY["llama"].build(dtype=torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture
def quantize(source: Path, tmp_path: Path, loftq: Callable[..., Outcome]) -> Quantize:
    def run(*options: object) -> tuple[Path, dict[str, Any]]:
        out = tmp_path / "out"
        outcome = loftq("quantize", "-m", source, "-o", out, "--json", *options)
        assert outcome.code == 0, outcome.err
        return out, json.loads(outcome.out)

    return run


def remeasured(directory: Path) -> dict[str, float]:
    """Every adapted layer's relative error, from the files."""
    original = weights(BATTERY["llama"].build(dtype=torch.bfloat16))
    reloaded = reload(directory)
    return {
        name: relative_error(original[name], reloaded.dequantized[name] + correction)
        for name, correction in reloaded.correction.items()
    }


@pytest.mark.parametrize(
    "options",
    [
        ("--quant-type", "fp4"),
        ("--double-quant",),
        ("--block-size", 32),
        ("--bits", 8),
        ("--quant-type", "fp4", "--double-quant", "--block-size", 32, "--rank", 4),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_reported_errors_are_those_of_the_files(
    options: tuple[Any, ...], quantize: Quantize
) -> None:
    out, document = quantize("--iterations", 2, *options)
    measured = remeasured(out)
    assert len(measured) == 14
    for layer in document["results"]["layers"]:
        assert measured[layer["name"]] == pytest.approx(layer["weight_error_relative"], abs=1e-5)
        assert layer["weight_error_relative"] < layer["quantized_only_error_relative"]


def test_any_lora_alpha_starts_equally_well(
    source: Path, tmp_path: Path, loftq: Callable[..., Outcome]
) -> None:
    """PEFT's own start loses part or all of its gain as soon as alpha is not the rank."""
    errors = []
    for number, options in enumerate(
        [
            ("--lora-alpha", 16),
            ("--lora-alpha", 8),
            ("--lora-alpha", 32),
            ("--lora-alpha", 128),
            ("--lora-alpha", 32, "--rslora"),
        ]
    ):
        out = tmp_path / str(number)
        outcome = loftq("quantize", "-m", source, "-o", out, "--rank", 16, "--quiet",
                        "--iterations", 2, *options)  # fmt: skip
        assert outcome.code == 0, outcome.err
        errors.append(remeasured(out))
    for other in errors[1:]:
        assert other == pytest.approx(errors[0], rel=1e-5)


def test_layers_outside_the_targets_are_quantized_without_an_adapter(quantize: Quantize) -> None:
    out, document = quantize("--target-modules", "q_proj,v_proj")
    reloaded = reload(out)
    adapted = {f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qv"}
    assert set(reloaded.correction) == adapted
    assert len(reloaded.dequantized) == 14
    results = document["results"]
    assert {layer["name"] for layer in results["layers"]} == adapted
    assert {layer["name"] for layer in results["without_adapter"]} == (
        set(reloaded.dequantized) - adapted
    )
    everything = results["layers"] + results["without_adapter"] + results["untouched"]
    assert sum(part["share_of_bytes"] for part in everything) == pytest.approx(1)
    assert json.loads((out / "loftq_init/adapter_config.json").read_text())["target_modules"] == [
        "q_proj",
        "v_proj",
    ]


def test_qlora_start_changes_nothing(quantize: Quantize) -> None:
    out, document = quantize("--init", "qlora")
    assert all(not correction.any() for correction in reload(out).correction.values())
    totals = document["results"]["totals"]
    assert totals["weight_error_relative"] == totals["quantized_only_error_relative"]


def test_several_output_files(quantize: Quantize, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    out, document = quantize("--iterations", 2)
    assert len(list(out.glob("model-*.safetensors"))) > 2
    assert not (out / "model.safetensors").exists()
    assert not list((out / "loftq_init").glob("part-*"))
    measured = remeasured(out)
    for layer in document["results"]["layers"]:
        assert measured[layer["name"]] == pytest.approx(layer["weight_error_relative"], abs=1e-5)


def test_untouched_tensors_are_the_same_bytes(quantize: Quantize, source: Path) -> None:
    from safetensors.torch import load_file

    out, document = quantize("--iterations", 2)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    names = [tensor["name"] for tensor in document["results"]["untouched"]]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" in names
    for name in names:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name])


def test_the_report_in_the_directory_is_the_document(quantize: Quantize) -> None:
    import hashlib

    out, document = quantize("--iterations", 2)
    report = json.loads((out / "loftq_report.json").read_text())
    assert report["results"] == document["results"]
    for file in report["results"]["files"]:
        content = (out / file["name"]).read_bytes()
        assert len(content) == file["bytes"]
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    named = {file["name"] for file in report["results"]["files"]}
    assert written - named == {"loftq_report.json"}


def test_the_same_line_gives_the_same_bytes(
    source: Path, tmp_path: Path, loftq: Callable[..., Outcome]
) -> None:
    contents = []
    for name in ("one", "two"):
        out = tmp_path / name / "out"
        assert loftq("quantize", "-m", source, "-o", out, "--rank", 4, "--iterations", 3).code == 0
        contents.append(
            {
                path.relative_to(out): path.read_bytes()
                for path in out.rglob("*")
                if path.is_file() and path.name not in ("loftq_report.json", "README.md")
            }
        )
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("alpha", "rslora", "expected"), [(16, False, 1.0), (8, False, 0.5), (32, True, 8.0)]
)
def test_lora_scaling_is_that_of_peft(alpha: int, rslora: bool, expected: float) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    from loftq_cli.engines.settings import Settings

    assert Settings(rank=16, lora_alpha=alpha, use_rslora=rslora).scaling == expected
    config = LoraConfig(r=16, lora_alpha=alpha, use_rslora=rslora, target_modules=["0"])
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(32, 32)), config)
    assert model.base_model.model[0].scaling["default"] == pytest.approx(expected)
