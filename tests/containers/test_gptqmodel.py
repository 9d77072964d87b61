"""What `quantize` writes in the hands of those who read GPTQ on a CPU: transformers, optimum and
gptqmodel.

To be run where the extra `gptq` is installed; elsewhere there is nothing to ask.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, GPTQConfig

from loftq_cli import api
from loftq_cli.containers.gptq import Gptq
from tests.containers.demo_opt import WrittenOpt, windows

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # a compiled kernel takes half a minute and gives the same
pytest.importorskip("gptqmodel")
pytest.importorskip("optimum")

pytestmark = pytest.mark.filterwarnings("default")  # theirs

NAME = "gptq"
WIDTHS = (2, 3, 4, 8)
BLOCK_SIZES = (32, 64, 128)
FLOAT16 = torch.finfo(torch.float16).eps
Quantized = Callable[..., WrittenOpt]


def load(written: WrittenOpt, bits: int) -> torch.nn.Module:
    """With the kernel in plain torch, which trains; at 4 bits another is chosen unless asked."""
    model, info = AutoModelForCausalLM.from_pretrained(
        written.directory,
        device_map="cpu",
        quantization_config=GPTQConfig(bits=bits, backend="torch"),
        output_loading_info=True,
    )
    assert not any(info.values()), info
    return model.eval()


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=tokens).logits.float()
    return found


def gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("bits", "block_size", "dtype"),
    [
        *((bits, block_size, "float32") for bits in WIDTHS for block_size in (*BLOCK_SIZES, -1)),
        *((bits, 64, "float16") for bits in WIDTHS),
        (3, 64, "bfloat16"),
    ],
)
def test_it_gives_what_the_dequantized_model_gives(
    bits: int, block_size: int, dtype: str, quantized_opt: Quantized
) -> None:
    written = quantized_opt(NAME, bits, block_size, dtype=dtype)
    model, container, Q = load(written, bits), written.container, written.Q()
    assert model.dtype == written.dtype
    assert {name for name, each in model.named_modules() if container.holds(each)} == set(Q)
    assert type(model.get_submodule("lm_head")) is torch.nn.Linear
    for module, expected in Q.items():
        # The kernel has the product of code and scale in float16, which is exact to 4 bits.
        held = container.held(model.get_submodule(module)).to(written.dtype)
        rtol = max(FLOAT16, torch.finfo(written.dtype).eps) if bits == 8 else 0.0
        torch.testing.assert_close(held, expected, rtol=rtol, atol=0.0)
    tokens = windows(2, 48)
    plain = logits(written.dequantized(), tokens)
    error = gap(logits(model, tokens), plain)
    assert error < max(FLOAT16, (2 if bits == 8 else 1) * torch.finfo(written.dtype).eps)
    assert error < gap(logits(written.original(), tokens), plain) / 2


def train(model: Any, tokens: torch.Tensor) -> None:
    """Once over the windows."""
    model.train()
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=4e-3)
    for batch in tokens.split(4):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def loss(model: Any, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        return float(model.eval()(input_ids=tokens, labels=tokens).loss)


def packed(model: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    return {name: each.clone() for name, each in model.named_buffers() if "qweight" in name}


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_an_adapter_trained_here_gives_the_same_on_compressed_tensors(
    bits: int, block_size: int, quantized_opt: Quantized, tmp_path: Path
) -> None:
    """Trained packed on one container, served on the other: the same adapter on the same Q."""
    pytest.importorskip("compressed_tensors")
    from peft import PeftModel

    ours = quantized_opt(NAME, bits, block_size)
    theirs = quantized_opt("compressed-tensors", bits, block_size)
    tokens = windows(40, 128)
    heldout = torch.arange(len(tokens)) % 5 == 0  # of the same files, which are new to the demo

    model = PeftModel.from_pretrained(
        load(ours, bits), ours.directory, subfolder="loftq_init", is_trainable=True
    )
    codes, before = packed(model), loss(model, tokens[heldout])
    start = logits(model, tokens[heldout])
    train(model, tokens[~heldout])
    assert loss(model, tokens[heldout]) < before - 0.01
    found = logits(model, tokens[heldout])
    assert all(torch.equal(each, codes[name]) for name, each in packed(model).items())
    assert len(codes) == 24
    model.save_pretrained(tmp_path)

    base = AutoModelForCausalLM.from_pretrained(
        theirs.directory, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    served = PeftModel.from_pretrained(base, tmp_path)
    difference = gap(found, logits(served, tokens[heldout]))
    # As above: float16 at 8 bits, else the order of float32's sums.
    assert difference < (FLOAT16 if bits == 8 else 1e-5)
    assert difference < 0.01 * gap(found, start)  # what training changed


@pytest.mark.parametrize("bits", WIDTHS)
def test_verify_loads_it(bits: int, quantized_opt: Quantized) -> None:
    results = api.verify(str(quantized_opt(NAME, bits).directory)).results
    assert {test.name: test.status for test in results.tests}["forward"] == "passed"


def test_the_kernel_that_a_cpu_gets_at_4_bits_stops_training(quantized_opt: Quantized) -> None:
    """Why the README names another: a pass in eval mode makes it one for inference for good."""
    written = quantized_opt(NAME, 4, dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(written.directory, device_map="cpu").eval()
    logits(model, windows(1, 8))
    layer = model.train().get_submodule("model.decoder.layers.0.fc1")
    given = torch.randn(3, 256, dtype=torch.bfloat16, requires_grad=True)
    assert not layer(given).requires_grad


def test_each_width_is_read_where_dynamic_says_so(quantized_opt: Quantized) -> None:
    """By gptqmodel itself; transformers has one width for all."""
    from gptqmodel import BACKEND, GPTQModel

    written = quantized_opt(NAME, "8x1,3", dtype="bfloat16")
    assert set(written.bits.values()) == {3, 8}
    loaded = GPTQModel.load(str(written.directory), device="cpu", backend=BACKEND.GPTQ_TORCH)
    for module, Q in written.Q().items():
        held = written.container.held(loaded.model.get_submodule(module))
        assert torch.equal(held, Q), module


@pytest.mark.parametrize("name", ["Qwen2-MoE", "Qwen3-MoE", "DeepSeek-V3"])
def test_experts_stay_packed_in_its_own_classes(name: str, tmp_path: Path) -> None:
    from gptqmodel import BACKEND, GPTQModel
    from peft import PeftModel

    from loftq_cli.models.loading import load_model
    from loftq_cli.models.spec import DEMO_DIRECTORY
    from tests.experts import experts_of, save, tokens

    original, out = save(name, tmp_path / "source"), tmp_path / "out"
    for each in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_DIRECTORY / each, tmp_path / "source" / each)
    api.quantize(
        str(tmp_path / "source"), output=out, container=NAME, rank=4, iterations=1,
        experts="quantize",
    )  # fmt: skip
    loaded = GPTQModel.load(str(out), device="cpu", backend=BACKEND.GPTQ_TORCH)
    held = [path for path, each in loaded.model.named_modules() if Gptq.holds(each)]
    assert sum(".experts." in each for each in held) == len(experts_of(original))
    model = PeftModel.from_pretrained(
        loaded.model, out, subfolder="loftq_init", is_trainable=True
    ).eval()
    on = [path for path, each in model.named_modules() if hasattr(each, "lora_A")]
    assert on
    assert not any(".experts." in each for each in on)
    ours = load_model(out, device="cpu", dtype="float32").model
    # It computes in 16 bits.
    assert gap(logits(model, tokens()), logits(ours, tokens())) < 0.02
    assert torch.equal(logits(model, tokens()), logits(model, tokens()))
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    trained = [each.grad for each in model.parameters() if each.requires_grad]
    assert len(trained) == 2 * len(on)
    assert all(each is not None and bool(each.isfinite().all()) for each in trained)
