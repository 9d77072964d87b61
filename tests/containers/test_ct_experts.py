"""Quantized experts in the hands of transformers 5, which dequantizes and then stacks them.

To be run where the extra `compressed-tensors` is installed; elsewhere there is nothing to ask.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from loftq_cli import api
from loftq_cli.models.loading import load_model
from tests.experts import (
    NAMES,
    relative,
    same_experts,
    save,
    save_stacked,
    takes_a_step,
    tokens,
)

pytest.importorskip("compressed_tensors")

pytestmark = pytest.mark.filterwarnings("default")  # theirs


@pytest.mark.parametrize("name", NAMES)
def test_transformers_stacks_what_was_quantized_one_by_one(name: str, tmp_path: Path) -> None:
    original, out = save(name, tmp_path / "source"), tmp_path / "out"
    api.quantize(
        str(tmp_path / "source"), output=out, container="compressed-tensors", rank=4, iterations=2
    )
    model, info = AutoModelForCausalLM.from_pretrained(
        out, quantization_config=CompressedTensorsConfig(dequantize=True), output_loading_info=True
    )
    assert not any(info.values()), info
    assert same_experts(model, out) > 0
    adapted = PeftModel.from_pretrained(
        model.eval(), out, subfolder="loftq_init", is_trainable=True
    ).eval()
    ours = load_model(out, device="cpu", dtype="float32").model
    with torch.no_grad():
        found = adapted(tokens()).logits
        assert torch.equal(found, ours(tokens()).logits)
        assert relative(found, original(tokens()).logits) < 0.2
    takes_a_step(adapted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Llama 4", "Qwen3.5-MoE"])
def test_what_files_had_as_stacks(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Llama 4's experts become layers there, those of Qwen3.5 a stack again."""
    original, out = save_stacked(name, tmp_path / "source", dtype=dtype), tmp_path / "out"
    api.quantize(
        str(tmp_path / "source"), output=out, container="compressed-tensors", rank=4, iterations=2
    )
    model, info = AutoModelForCausalLM.from_pretrained(
        out, quantization_config=CompressedTensorsConfig(dequantize=True), output_loading_info=True
    )
    assert not any(info.values()), info
    adapted = PeftModel.from_pretrained(
        model.eval(), out, subfolder="loftq_init", is_trainable=True
    ).eval()
    ours = load_model(out, device="cpu", dtype=str(dtype).removeprefix("torch.")).model
    with torch.no_grad():
        found, close = adapted(tokens()).logits, ours(tokens()).logits
        assert relative(found, close) < 4 * torch.finfo(dtype).eps
        assert relative(found, original(tokens()).logits) < 0.3
    if dtype == torch.float32:
        takes_a_step(adapted)
    tests = api.verify(out, source=str(tmp_path / "source")).results.tests
    assert {test.name: test.status for test in tests}["forward"] == "passed"


def test_the_forward_pass_of_verify(tmp_path: Path) -> None:
    save("Qwen3-MoE", tmp_path / "source")
    out = tmp_path / "out"
    api.quantize(
        str(tmp_path / "source"), output=out, container="compressed-tensors", rank=4, iterations=1
    )
    tests = api.verify(out, source=str(tmp_path / "source")).results.tests
    assert {test.name: test.status for test in tests}["forward"] == "passed"
