"""What every container promises, of each that is found: a new one is held to it too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loftq_cli.checkpoint.index import open_checkpoint
from loftq_cli.checkpoint.safetensors import DTYPE_BITS
from loftq_cli.checkpoint.writer import write_safetensors
from loftq_cli.containers import (
    container_names,
    container_of,
    containers,
    holds_codes,
    weights_in,
    widths,
)
from loftq_cli.containers.base import Container, Damaged, Weight
from loftq_cli.engines.settings import Settings

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def forms() -> Iterator[tuple[int, Container]]:
    """Every width of every container, in every number format."""
    for kind in containers():
        for bits in kind.all_widths:
            options = {(name, double) for name in ("nf4", "fp4") for double in (False, True)}
            found = {kind.of(Settings(bits, quant_type=name, double_quant=double))
                     for name, double in options}  # fmt: skip
            yield from ((bits, each) for each in found if bits in each.widths)


FORMS = sorted(((b, c) for b, c in forms() if c.quantizes), key=str)


def weight_of(bits: int, dtype: str = "BF16") -> tuple[Weight, torch.Tensor]:
    W = torch.randn(96, 128, generator=torch.Generator().manual_seed(bits)).to(DTYPES[dtype])
    return Weight("h.0.up.weight", "h.0.up", (96, 128), bits, dtype), W


@pytest.mark.parametrize(("bits", "container"), FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_what_was_planned_and_what_is_read(
    bits: int, container: Container, dtype: str, tmp_path: Path
) -> None:
    weight, W = weight_of(bits, dtype)
    quantizer = container.quantizer(bits)
    quantized = quantizer.quantize(W, W.dtype)
    planned = container.planned(weight)
    chunks = dict(container.tensors(weight.name, quantized))
    assert {each.name: each.nbytes for each in planned} == {
        name: chunk.nbytes for name, chunk in chunks.items()
    }
    write_safetensors(tmp_path / "model.safetensors", planned, chunks.items())
    tensors = open_checkpoint(tmp_path).tensors
    assert weights_in(tensors) == {weight.name}
    stored = container.read(tensors, weight, "cpu")
    container.require_codes(stored)
    Q = quantizer.dequantize(quantized)
    assert torch.equal(quantizer.dequantize(container.quantized(stored)), Q)
    assert torch.equal(container.runtime(stored), Q)


@pytest.mark.parametrize(("bits", "container"), FORMS, ids=str)
def test_a_part_that_is_missing_or_of_another_shape_is_damage(
    bits: int, container: Container, tmp_path: Path
) -> None:
    weight, W = weight_of(bits)
    quantized = container.quantizer(bits).quantize(W, W.dtype)
    planned = container.planned(weight)
    chunks = dict(container.tensors(weight.name, quantized))
    write_safetensors(tmp_path / "model.safetensors", planned, chunks.items())
    tensors = dict(open_checkpoint(tmp_path).tensors)
    for name in tensors:
        with pytest.raises(Damaged):
            container.read({each: tensors[each] for each in tensors if each != name}, weight, "cpu")
    larger = Weight(weight.name, weight.module, (128, 128), bits, weight.dtype)
    with pytest.raises(Damaged):
        container.read(tensors, larger, "cpu")


@pytest.mark.parametrize(("bits", "container"), FORMS, ids=str)
def test_a_weight_takes_its_codes_and_its_scales(bits: int, container: Container) -> None:
    """What estimates are made of, against the plan: little but tables and JSON comes beside it."""
    weight, _ = weight_of(bits)
    beside = container.scale_bytes(weight.shape, bits)
    told = 96 * 128 * container.code_bits(bits) // 8 + beside
    planned = sum(each.nbytes for each in container.planned(weight))
    assert container.code_bits(bits) >= bits
    assert container.double_quant or told <= planned < told + 256


def test_name_and_width_choose_one_container() -> None:
    assert {2, 3, 4, 8} <= set(widths())
    assert container_names()[0] == "bitsandbytes"
    assert {"gptq", "compressed-tensors"} <= set(container_names())
    for name in container_names():
        for bits in (*widths(), 16):
            container = Settings(bits, container_name=name).container
            assert bits in container.widths
            assert container.name == (name if bits < 16 else "none")
            assert container == container_of(name, bits, Settings(bits))
        with pytest.raises(KeyError):
            container_of(name, 1, Settings())
    with pytest.raises(KeyError):
        container_of("awq", 4, Settings())


def test_layers_with_codes_are_known_from_others() -> None:
    class Linear4bit(torch.nn.Linear):
        """As bitsandbytes calls it."""

    assert holds_codes(Linear4bit(32, 32))
    assert not holds_codes(torch.nn.Linear(32, 32))


def test_weights_that_stay_lie_as_they_lay() -> None:
    container = Settings(16).container
    weight = Weight("h.0.up.weight", "h.0.up", (96, 128), 16, "F16", transposed=True)
    (planned,) = container.planned(weight)
    assert (planned.name, planned.dtype, planned.shape) == ("h.0.up.weight", "F16", (128, 96))
    assert planned.nbytes == 96 * 128 * DTYPE_BITS["F16"] // 8
    assert not container.quantizes
