"""The compiled kernels against the readable reference: every bit of what they store and leave."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from test_blockwise import SHAPES, adversarial_weights, same_bits
from torch import Tensor

from loftq_cli.core import compiled_step, kernels, residual
from loftq_cli.core.blockwise import (
    BLOCK_SIZES,
    SOURCE_DTYPES,
    BlockwiseFormat,
    QuantizedBlockwise,
    dequantize_blockwise,
    quantize_blockwise,
)
from loftq_cli.core.codebooks import codebook
from loftq_cli.core.compiled_step import CompiledSteps
from loftq_cli.core.layouts import choices, flat
from loftq_cli.core.quantizers import Blockwise
from loftq_cli.core.steps import Factors


def assert_same(ours: QuantizedBlockwise, reference: QuantizedBlockwise) -> None:
    assert same_bits(ours.packed, reference.packed)
    assert same_bits(ours.absmax, reference.absmax)
    assert (ours.nested_absmax is None) == (reference.nested_absmax is None)
    if ours.nested_absmax is not None and reference.nested_absmax is not None:
        assert same_bits(ours.nested_absmax, reference.nested_absmax)
    assert ours.nested_offset == reference.nested_offset
    assert (ours.shape, ours.format, ours.dtype) == (
        reference.shape,
        reference.format,
        reference.dtype,
    )


def assert_as_the_reference(W: Tensor, fmt: BlockwiseFormat, products: torch.dtype) -> None:
    quantized, left = CompiledSteps(W, fmt, W.dtype, products=products).quantize()
    reference = quantize_blockwise(W, fmt)
    assert_same(quantized, reference)
    rest = W.float() - dequantize_blockwise(reference).float()
    assert torch.equal(left.matrix, rest.to(products))
    assert torch.equal(left.exact().matrix, rest)
    energy = float(rest.double().square().sum())
    assert left.energy == pytest.approx(energy, rel=1e-12)
    assert left.exact().energy == pytest.approx(energy, rel=1e-12)
    assert torch.equal(compiled_step.residual_of(W, reference, products).matrix, left.matrix)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", SOURCE_DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_all_formats(
    quant_type: str, block_size: int, dtype: torch.dtype, double_quant: bool
) -> None:
    fmt = BlockwiseFormat(quant_type, block_size, double_quant)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(block_size)
    for shape in SHAPES:
        W = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
        W.view(-1)[W.numel() // 3 : W.numel() // 3 + 2 * block_size] = 0
        for products in (torch.float32, torch.bfloat16):
            assert_as_the_reference(W, fmt, products)


@settings(max_examples=100, deadline=None)
@given(adversarial_weights())
def test_adversarial_values(case: tuple[Tensor, BlockwiseFormat]) -> None:
    W, fmt = case
    fmt = BlockwiseFormat(fmt.quant_type, fmt.block_size)
    quantized, _ = CompiledSteps(W, fmt, W.dtype).quantize()
    assert_same(quantized, quantize_blockwise(W, fmt))


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 256), (33, 65), (7, 100)])
def test_subtracting_a_product(shape: tuple[int, int], products: torch.dtype) -> None:
    W, product = torch.randn(shape), (torch.randn(shape) * 0.1).to(products)
    fmt = BlockwiseFormat("nf4", 64)
    packed = torch.empty((W.numel() + 1) // 2, dtype=torch.uint8)
    absmax, rest = torch.empty(-(-W.numel() // 64)), torch.empty_like(product)
    energy = kernels.quantize(
        W.view(-1).numpy(),
        flat(product),
        64,
        *choices(codebook("nf4")),
        False,
        kernels.FLOAT32,
        packed.numpy(),
        absmax.numpy(),
        flat(rest),
    )
    reference = quantize_blockwise(W - product.float(), fmt)
    assert same_bits(packed.view(-1, 1), reference.packed)
    assert same_bits(absmax, reference.absmax)
    exact = W - dequantize_blockwise(reference)
    assert torch.equal(rest, exact.to(products))
    assert energy == pytest.approx(float(exact.double().square().sum()), rel=1e-12)


@pytest.mark.parametrize("shape", [(200, 96), (100, 33), (64, 500), (3, 4099), (130, 64)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_many_pieces_make_the_same_whole(
    shape: tuple[int, int], double_quant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residual, "PIECE", 2048)
    for block_size in (32, 128, 4096):
        fmt = BlockwiseFormat("nf4", block_size, double_quant)
        assert_as_the_reference(torch.randn(shape), fmt, torch.float32)
        assert_as_the_reference(torch.randn(shape[::-1]).t(), fmt, torch.bfloat16)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_the_step_and_its_products(products: torch.dtype, double_quant: bool) -> None:
    W = torch.randn(300, 160)
    left, right, probe = torch.randn(300, 4) * 0.1, torch.randn(4, 160), torch.randn(160, 6)
    fmt = BlockwiseFormat("nf4", 64, double_quant)
    steps = CompiledSteps(W, fmt, W.dtype, products=products)
    quantized, rest = steps.quantize(Factors(left, right, probe))
    exact = W - dequantize_blockwise(quantized)
    assert torch.equal(rest.exact().matrix, exact)
    tolerance = 0.06 if products == torch.bfloat16 else 1e-4
    scale = {"rtol": tolerance, "atol": tolerance}
    assert rest.probed is not None
    assert rest.times(probe) is rest.probed
    torch.testing.assert_close(rest.probed.float(), exact @ probe, **scale)
    other = torch.randn(160, 3)
    torch.testing.assert_close(rest.times(other).float(), exact @ other, **scale)
    Y = torch.randn(300, 5)
    torch.testing.assert_close(rest.transposed_times(Y).float(), exact.t() @ Y, **scale)
    remainder = steps.remainder(quantized, Factors(left, right))
    assert remainder == pytest.approx(float((exact - left @ right).double().square().sum()))
    # The codes are those of a target within the rounding of the product.
    reference = quantize_blockwise(W - left @ right, fmt)
    differ = (quantized.packed != reference.packed).float().mean()
    assert differ < (0.05 if products == torch.bfloat16 else 0.001)


def test_a_step_takes_the_memory_of_the_last_ones_residual() -> None:
    W, fmt = torch.randn(200, 160), BlockwiseFormat("nf4", 64)
    carried = Factors(torch.randn(200, 2) * 0.1, torch.randn(2, 160))
    _, expected = CompiledSteps(W, fmt, W.dtype).quantize(carried)
    steps = CompiledSteps(W, fmt, W.dtype)
    _, first = steps.quantize()
    _, second = steps.quantize(carried)
    assert second.matrix.data_ptr() == first.matrix.data_ptr()
    assert torch.equal(second.matrix, expected.matrix)
    assert second.energy == expected.energy


def float32_patterns() -> Tensor:
    """Every exponent with mantissas around the ties of bfloat16 and float16, and random ones."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.arange(255, dtype=torch.int32) << 23
    ties = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0x18000, 0xFFF, 0x1000, 0x1001, 0x3000])
    ends = torch.tensor([0x7FFFFF, 0x7FF000, 0x7FEFFF, 0x7F8000, 0x400000])
    mantissas = torch.cat((ties, ends, torch.randint(0, 1 << 23, (64,), generator=generator)))
    magnitudes = (exponents[:, None] | mantissas.int()).view(-1)
    return torch.cat((magnitudes, magnitudes | torch.iinfo(torch.int32).min)).view(torch.float32)


@pytest.mark.parametrize(
    ("rounding", "dtype"),
    [(kernels.BFLOAT16, torch.bfloat16), (kernels.FLOAT16, torch.float16)],
)
def test_rounding_is_that_of_torch(rounding: int, dtype: torch.dtype) -> None:
    values = float32_patterns()
    rounded = values.clone()
    kernels._round(rounded.numpy(), rounding)
    assert same_bits(rounded, values.to(dtype).float())


def test_storing_as_bfloat16_is_that_of_torch() -> None:
    values = float32_patterns()
    stored = np.empty(values.numel(), np.uint16)
    kernels._store(values.numpy(), stored)
    expected = values.bfloat16().view(torch.uint16)
    assert torch.equal(torch.from_numpy(stored), expected)


def test_sum_of_squares_overflows_nowhere() -> None:
    X = torch.full((300, 300), 3e38)
    X[0, 0] = 1e-30
    assert residual.sum_of_squares(X) == pytest.approx((300 * 300 - 1) * float(X[1, 1]) ** 2)
    assert residual.sum_of_squares(X.t().bfloat16()) > 0


def test_the_readable_quantizer_gives_the_same() -> None:
    W = torch.randn(512, 256)
    compiled = Blockwise(BlockwiseFormat("nf4", 64)).steps(W).quantize()
    readable = Blockwise(BlockwiseFormat("nf4", 64), readable=True).steps(W).quantize()
    assert_same(compiled[0], readable[0])
    assert torch.equal(compiled[1].matrix, readable[1].matrix)
    assert compiled[1].energy == pytest.approx(readable[1].energy, rel=1e-12)


def test_somewhere_that_cannot_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernels.njit

    def njit(**options: object) -> object:
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(kernels, "njit", njit)
    doubled = kernels._jit()(lambda x: 2 * x)
    assert doubled(21) == 42
