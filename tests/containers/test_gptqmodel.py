"""GPTQ files in the hands of those who read them on a CPU: transformers, optimum and gptqmodel.

To be run where the extra `gptq` is installed; elsewhere there is nothing to ask.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, GPTQConfig

from loftq_cli.containers.compressed_tensors import CompressedTensors
from loftq_cli.containers.gptq import Gptq
from loftq_cli.models.spec import DEMO_DIRECTORY
from tests.containers.integer_models import PROJECTIONS, tokens, write_model

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # a compiled kernel takes half a minute and gives the same
pytest.importorskip("gptqmodel")
pytest.importorskip("optimum")

pytestmark = pytest.mark.filterwarnings("default")  # theirs

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def load(directory: Path, bits: int) -> torch.nn.Module:
    """With the kernel in plain torch, which trains; at 4 bits another is chosen unless asked."""
    kernel = GPTQConfig(bits=bits, backend="torch")
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, device_map="cpu", quantization_config=kernel, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("block_size", [32, 64, 128, -1])
def test_codes_and_scales_are_read_as_they_were_written(
    bits: int, block_size: int, tmp_path: Path
) -> None:
    container = Gptq("int", block_size)
    written = write_model(tmp_path, container, bits, torch.float16)
    model = load(tmp_path, bits)
    held = {name for name, each in model.named_modules() if container.holds(each)}
    assert held == set(written.Q)
    for module, Q in written.Q.items():
        assert torch.equal(container.held(model.get_submodule(module)), Q), module


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_gives_what_the_dequantized_model_gives(bits: int, dtype: str, tmp_path: Path) -> None:
    written = write_model(tmp_path, Gptq("int", 64), bits, DTYPES[dtype])
    model, plain = load(tmp_path, bits), written.dequantized()
    assert model.dtype == DTYPES[dtype]
    with torch.no_grad():
        found = model(tokens()).logits.float()
        expected = plain(tokens()).logits.float()
        original = written.original.eval()(tokens()).logits.float()
    error = (found - expected).norm() / expected.norm()
    # At 8 bits the kernel rounds each weight twice where the model is not in float16.
    assert error < (2 if bits == 8 else 1) * torch.finfo(DTYPES[dtype]).eps
    assert error < 0.8 * (original - expected).norm() / expected.norm()


def trained(base: torch.nn.Module) -> tuple[Any, list[float]]:
    """A few steps of LoRA on the same tokens, and the loss before each."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=8, target_modules=list(PROJECTIONS)))
    model.train()
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    losses = []
    for _ in range(6):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return model.eval(), losses


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_peft_trains_on_the_packed_weights(bits: int, tmp_path: Path) -> None:
    write_model(tmp_path, Gptq("int", 64), bits, torch.bfloat16)
    base = load(tmp_path, bits)
    before = {name: each.clone() for name, each in base.named_buffers() if "qweight" in name}
    _, losses = trained(base)
    assert losses[-1] < losses[0] - 0.05, losses
    for name, each in base.named_buffers():
        if "qweight" in name:
            assert torch.equal(each, before[name.replace("base_layer.", "")]), name


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_was_trained_here_gives_the_same_on_compressed_tensors(
    bits: int, tmp_path: Path
) -> None:
    """Trained on one container, served on the other: the same adapter on the same Q."""
    pytest.importorskip("compressed_tensors")
    from peft import PeftModel

    ours, theirs = tmp_path / "gptq", tmp_path / "compressed-tensors"
    write_model(ours, Gptq("int", 64), bits, torch.bfloat16)
    write_model(theirs, CompressedTensors("int", 64), bits, torch.bfloat16)
    model, _ = trained(load(ours, bits))
    model.save_pretrained(tmp_path / "adapter")
    served = AutoModelForCausalLM.from_pretrained(
        theirs, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    with torch.no_grad():
        plain = served.eval()(tokens()).logits.float()
        found = model(input_ids=tokens()).logits.float()
        served = PeftModel.from_pretrained(served, tmp_path / "adapter").eval()
        expected = served(input_ids=tokens()).logits.float()
    gap = (found - expected).norm() / expected.norm()
    assert gap < (2 if bits == 8 else 1) * torch.finfo(torch.bfloat16).eps
    assert gap < 0.2 * (plain - expected).norm() / expected.norm()  # that the adapter changes


def test_the_kernel_that_a_cpu_gets_at_4_bits_stops_training(tmp_path: Path) -> None:
    """Why the README names another: a pass in eval mode makes it one for inference for good."""
    write_model(tmp_path, Gptq("int", 64), 4, torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu").eval()
    with torch.no_grad():
        model(tokens())
    layer = model.train().get_submodule("model.layers.0.mlp.up_proj")
    given = torch.randn(3, 128, dtype=torch.bfloat16, requires_grad=True)
    assert not layer(given).requires_grad


def test_each_width_is_read_where_dynamic_says_so(tmp_path: Path) -> None:
    """By gptqmodel itself, which takes scales in bfloat16; transformers has one width for all."""
    from gptqmodel import BACKEND, GPTQModel

    bits = {
        **dict.fromkeys(PROJECTIONS, 4),
        "o_proj": 3,
        "down_proj": 8,
        "gate_proj": 2,
        "up_proj": 2,
    }
    container = Gptq("int", 64)
    written = write_model(tmp_path, container, bits, torch.bfloat16)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # it wants one
        shutil.copy(DEMO_DIRECTORY / name, tmp_path)
    loaded = GPTQModel.load(str(tmp_path), device="cpu", backend=BACKEND.GPTQ_TORCH)
    for module, Q in written.Q.items():
        assert torch.equal(container.held(loaded.model.get_submodule(module)), Q), module


def test_what_is_skipped_stays(tmp_path: Path) -> None:
    written = write_model(tmp_path, Gptq("int", 64), 2, torch.float16)
    head = load(tmp_path, 2).lm_head
    assert type(head) is torch.nn.Linear
    assert torch.equal(head.weight, written.original.lm_head.weight)
