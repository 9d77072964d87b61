"""`quantize --dtype`: a directory for cards that lack the checkpoint's dtype."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.battery import BATTERY, text_inputs
from tests.conftest import Outcome

Loftq = Callable[..., Outcome]
FEW = ("--rank", 4, "--iterations", 1, "--json")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 in bfloat16: it has LayerNorm, biases and transposed weights."""
    directory = tmp_path_factory.mktemp("source")
    BATTERY["gpt2"].build(dtype=torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory, loftq: Loftq) -> Path:
    out = tmp_path_factory.mktemp("written") / "out"
    outcome = loftq("quantize", "-m", source, "-o", out, "--dtype", "float16", *FEW)
    assert outcome.code == 0, outcome.err
    return out


def weights(directory: Path) -> dict[str, bytes]:
    found = (*directory.glob("*.safetensors"), *directory.glob("loftq_init/*.safetensors"))
    return {path.name: path.read_bytes() for path in found}


def test_it_is_as_if_the_checkpoint_were_stored_in_that_dtype(
    written: Path, tmp_path: Path, loftq: Loftq
) -> None:
    BATTERY["gpt2"].build(dtype=torch.bfloat16).half().save_pretrained(tmp_path / "half")
    assert loftq("quantize", "-m", tmp_path / "half", "-o", tmp_path / "out", *FEW).code == 0
    assert weights(written) == weights(tmp_path / "out")


def test_all_that_is_not_quantized_is_in_it(written: Path) -> None:
    for name, tensor in load_file(written / "model.safetensors").items():
        if name.endswith("bitsandbytes__nf4"):
            assert json.loads(bytes(tensor.tolist()))["dtype"] == "float16"
        elif not name.endswith((".absmax", ".quant_map")) and tensor.is_floating_point():
            assert tensor.dtype == torch.float16, name
    config = json.loads((written / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert config["quantization_config"]["bnb_4bit_compute_dtype"] == "float16"
    assert "stored in float16" in (written / "README.md").read_text()


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float16}])
def test_it_loads_runs_and_trains_in_float16(written: Path, options: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(written, **options)
    model = PeftModel.from_pretrained(model, written, subfolder="loftq_init", is_trainable=True)
    inputs = text_inputs()
    outputs = model(**inputs, labels=inputs["input_ids"])
    assert outputs.logits.dtype == torch.float16
    outputs.loss.backward()
    gradients = [each.grad for name, each in model.named_parameters() if "lora_B" in name]
    assert gradients
    assert all(each is not None and bool(each.any()) for each in gradients)


def test_verify_loads_it_in_the_dtype_that_is_asked_for(
    written: Path, source: Path, tmp_path: Path, loftq: Loftq
) -> None:
    assert loftq("verify", written, "--dtype", "float16").code == 0
    assert loftq("quantize", "-m", source, "-o", tmp_path / "out", *FEW).code == 0
    assert loftq("verify", tmp_path / "out").code == 0
    outcome = loftq("verify", tmp_path / "out", "--dtype", "float16")
    assert outcome.code == 3
    assert "loaded with dtype=float16 it does not run" in outcome.err
    assert "quantize --dtype float16" in outcome.err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("init", ["loftq", "lora"])
def test_other_dtypes_and_weights_that_are_not_quantized(
    dtype: str, init: str, tmp_path: Path, loftq: Loftq
) -> None:
    """A classifier, whose head is trained in full and so lies in the adapter's file too."""
    source, out = tmp_path / "source", tmp_path / "out"
    model = BATTERY["bert"].build(dtype=torch.float16)
    model.save_pretrained(source)
    line = ("quantize", "-m", source, "-o", out, "--dtype", dtype, "--init", init)
    options = FEW if init == "loftq" else ("--rank", 4, "--json")
    outcome = loftq(*line, *options)
    assert outcome.code == 0, outcome.err
    assert loftq("verify", out).code == 0
    foreseen = loftq(*line, *options, "--dry-run")
    totals = [json.loads(each.out)["results"]["totals"] for each in (outcome, foreseen)]
    for name in ("output_bytes", "input_bytes"):
        assert totals[0][name] == totals[1][name]
    stored = {str(each.dtype) for each in load_file(out / "model.safetensors").values()}
    assert stored <= {f"torch.{dtype}", "torch.uint8", "torch.float32", "torch.int64"}
    assert f"torch.{dtype}" in stored


def test_a_value_beyond_its_range_is_refused(tmp_path: Path, loftq: Loftq) -> None:
    source = tmp_path / "source"
    BATTERY["llama"].build().save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    line = ("quantize", "-m", source, "-o", tmp_path / "out", *FEW)
    outcome = loftq(*line, "--dtype", "float16")
    assert outcome.code == 1
    assert "'model.norm.weight' does not fit into float16" in outcome.err
    assert "1e+05" in outcome.err
    assert not (tmp_path / "out").exists()
    assert loftq(*line, "--dtype", "bfloat16").code == 0


def test_a_run_in_another_dtype_is_another_run(source: Path) -> None:
    from loftq_cli.engines.settings import Settings

    assert "dtype" not in Settings().as_dict(), "versions that knew none had the same fingerprint"
    assert Settings(dtype="float16").as_dict()["dtype"] == "float16"
