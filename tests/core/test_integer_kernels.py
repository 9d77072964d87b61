"""The compiled loops of integers against the readable reference: every bit that they store."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from test_blockwise import same_bits
from test_integers import FORMATS, adversarial, awkward, normal
from test_kernels import float32_patterns
from torch import Tensor

from loftq_cli.core import compiled_step, integer_kernels, residual
from loftq_cli.core.blockwise import SOURCE_DTYPES
from loftq_cli.core.codebooks import INTEGER_BITS, LARGEST_SCALE, IntegerGrid
from loftq_cli.core.compiled_step import CompiledSteps
from loftq_cli.core.integers import (
    IntegerFormat,
    QuantizedIntegers,
    dequantize_integers,
    quantize_integers,
)
from loftq_cli.core.layouts import IntegerLayout, flat
from loftq_cli.core.quantizers import Integers
from loftq_cli.core.steps import Factors


def assert_same(ours: QuantizedIntegers, reference: QuantizedIntegers) -> None:
    assert same_bits(ours.codes, reference.codes)
    assert same_bits(ours.scales, reference.scales)
    assert (ours.format, ours.dtype) == (reference.format, reference.dtype)


def assert_compiled_as_read(
    W: Tensor, fmt: IntegerFormat, previous: QuantizedIntegers | None = None, search: bool = True
) -> QuantizedIntegers:
    """Returns what both gave."""
    around = None if previous is None else previous.scales
    reference = quantize_integers(W, fmt, search=search, previous=around)
    rest = W.float() - dequantize_integers(reference).float()
    energy = float(rest.double().square().sum())
    for products in (torch.float32, torch.bfloat16):
        steps = CompiledSteps(W, fmt, W.dtype, search=search, products=products)
        quantized, left = steps.quantize(like=previous)
        assert_same(quantized, reference)
        assert torch.equal(left.matrix, rest.to(products))
        assert torch.equal(left.exact().matrix, rest)
        assert left.energy == pytest.approx(energy, rel=1e-12)
        assert torch.equal(compiled_step.residual_of(W, reference, products).matrix, left.matrix)
    return reference


@pytest.mark.parametrize("dtype", SOURCE_DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_all_formats(fmt: IntegerFormat, dtype: torch.dtype) -> None:
    W = awkward(dtype)
    W[13] = W[12]  # squares of the largest values of a dtype have no sum
    assert_compiled_as_read(W, fmt, search=False)
    found = assert_compiled_as_read(W, fmt)
    assert_compiled_as_read((W.float() * 1.1).to(dtype), fmt, found)


@pytest.mark.parametrize("size", [1, 3, 33, 48, 1000])
def test_blocks_of_any_size(size: int) -> None:
    for bits in INTEGER_BITS:
        W, fmt = normal(70, 3 * size, seed=bits), IntegerFormat(bits, size)
        assert_compiled_as_read(W, fmt, assert_compiled_as_read(W + 0.1, fmt))


@settings(max_examples=80, deadline=None)
@given(adversarial())
def test_adversarial_values(case: tuple[Tensor, IntegerFormat]) -> None:
    W, fmt = case
    for search in (False, True):
        quantized, _ = CompiledSteps(W, fmt, W.dtype, search=search).quantize()
        assert_same(quantized, quantize_integers(W, fmt, search=search))
    again, _ = CompiledSteps(W, fmt, W.dtype, search=True).quantize(like=quantized)
    expected = quantize_integers(W, fmt, search=True, previous=quantized.scales)
    assert_same(again, expected)


@pytest.mark.parametrize("shape", [(200, 96), (130, 64), (3, 4160)])
def test_many_pieces_make_the_same_whole(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residual, "PIECE", 2048)
    for size in (32, None):
        assert_compiled_as_read(normal(*shape), IntegerFormat(4, size))
        transposed = normal(*shape[::-1]).t()
        assert_compiled_as_read(transposed, IntegerFormat(3, size), search=False)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16], ids=str)
def test_subtracting_a_product(products: torch.dtype, given: bool) -> None:
    W, product = normal(64, 256), (normal(64, 256, seed=1) * 0.1).to(products)
    form = IntegerLayout(IntegerFormat(4, 64), (64, 256), torch.float32)
    reference = quantize_integers(W - product.float(), form.format, search=given)
    codes, rest = torch.empty(64 * 256, dtype=torch.int8), torch.empty_like(product)
    scales = torch.empty(64 * 4)
    if given:
        form.search(flat(W), flat(product), None, scales)
    energy = form.quantize(flat(W), flat(product), codes, scales, flat(rest), given=given)
    assert_same(form.stored(codes, scales), reference)
    exact = W - dequantize_integers(reference)
    assert torch.equal(rest, exact.to(products))
    assert energy == pytest.approx(float(exact.double().square().sum()), rel=1e-12)


@pytest.mark.parametrize("products", [torch.bfloat16, torch.float32], ids=str)
def test_the_step_and_its_products(products: torch.dtype) -> None:
    W, fmt = normal(300, 160), IntegerFormat(4, 32)
    left, right, probe = normal(300, 4) * 0.1, normal(4, 160), normal(160, 6)
    steps = CompiledSteps(W, fmt, W.dtype, search=True, products=products)
    quantized, rest = steps.quantize(Factors(left, right, probe))
    exact = W - dequantize_integers(quantized)
    assert torch.equal(rest.exact().matrix, exact)
    tolerance = 0.06 if products == torch.bfloat16 else 1e-4
    torch.testing.assert_close(rest.times(probe).float(), exact @ probe, rtol=0.1, atol=tolerance)
    remainder = steps.remainder(quantized, Factors(left, right))
    assert remainder == pytest.approx(float((exact - left @ right).double().square().sum()))
    # The codes are those of a target within the rounding of the product.
    reference = quantize_integers(W - left @ right, fmt, search=True)
    differ = (quantized.codes != reference.codes).float().mean()
    assert differ < (0.1 if products == torch.bfloat16 else 0.003)


def test_the_readable_quantizer_gives_the_same() -> None:
    W, fmt = normal(512, 256), IntegerFormat(2, 64)
    compiled = Integers(fmt).steps(W).quantize()
    readable = Integers(fmt, readable=True).steps(W).quantize()
    assert_same(compiled[0], readable[0])
    assert torch.equal(compiled[1].matrix, readable[1].matrix)
    assert compiled[1].energy == pytest.approx(readable[1].energy, rel=1e-12)


def test_possible_scales_are_those_of_the_reference() -> None:
    values = float32_patterns()
    for largest in (LARGEST_SCALE, LARGEST_SCALE / 8):
        found = [
            integer_kernels.possible_scale(value, np.float32(largest)) for value in values.numpy()
        ]
        expected = IntegerGrid(4).possible(values, largest)
        assert same_bits(torch.tensor(np.array(found, np.float32)), expected)
