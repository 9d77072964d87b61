"""Blockwise quantization against bitsandbytes on the CPU: every stored and every read bit."""

import math

import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loftq_cli.core import blockwise
from loftq_cli.core.blockwise import (
    BLOCK_SIZES,
    SOURCE_DTYPES,
    BlockwiseFormat,
    QuantizedBlockwise,
    check_finite,
    dequantize_blockwise,
    quantize_blockwise,
    restore_absmax,
)
from loftq_cli.core.codebooks import codebook
from loftq_cli.errors import InvalidSetting, NonFiniteWeight

SHAPES = [
    (64, 256),
    (7, 128),
    (8, 96),  # blocks reach over row ends
    (3, 33),  # an odd number of values
    (129, 65),  # odd rows and columns
    (1, 5000),
    (5000, 1),
    (1, 1),
    (2, 4096),
]


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Equality that tells -0 from +0."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    if ours.is_floating_point():
        integers = torch.int32 if ours.element_size() == 4 else torch.int16
        ours, theirs = ours.view(integers), theirs.view(integers)
    return torch.equal(ours, theirs)


def plain_dequantization(packed: Tensor, state: bnb.QuantState) -> Tensor:
    """bitsandbytes' device-independent kernel, which has no shortcuts to go wrong."""
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return _dequantize_4bit_compute(
        packed.reshape(-1), absmax, state.code, state.blocksize, state.shape, state.dtype
    )


def assert_as_bitsandbytes(W: Tensor, fmt: BlockwiseFormat) -> QuantizedBlockwise:
    packed, state = bnb.quantize_4bit(
        W,
        blocksize=fmt.block_size,
        quant_type=fmt.quant_type,
        compress_statistics=fmt.double_quant,
    )
    ours = quantize_blockwise(W, fmt)
    assert same_bits(ours.packed, packed)
    assert same_bits(ours.absmax, state.absmax)
    if fmt.double_quant:
        assert ours.nested_absmax is not None
        assert same_bits(ours.nested_absmax, state.state2.absmax)
        assert ours.nested_offset == state.offset.item()
    else:
        assert ours.nested_absmax is None
        assert ours.nested_offset is None
    assert same_bits(dequantize_blockwise(ours), plain_dequantization(packed, state))
    if not avx512_misreads(ours.shape, fmt.block_size):
        theirs = bnb.dequantize_4bit(packed, state)
        assert_as_the_native_kernel(dequantize_blockwise(ours), theirs)
    return ours


def avx512_misreads(shape: tuple[int, int], block_size: int) -> bool:
    """Whether bitsandbytes' AVX512 kernel dequantizes such a weight wrongly (0.50.2 does).

    It looks the absmax up at ``row · (in // block_size) + column // block_size``, which is the
    right block only while blocks end where rows end. A row of other than a multiple of sixteen
    values, or blocks of 2048 and more, take another path, which is right.
    """
    out_features, in_features = shape
    return (
        out_features > 1
        and out_features * in_features > block_size
        and in_features % block_size != 0
        and in_features % 16 == 0
        and block_size < 2048
    )


def assert_as_the_native_kernel(ours: Tensor, theirs: Tensor) -> None:
    """Every bit, but for two habits of bitsandbytes' kernels.

    AVX512-BF16 rounds to bfloat16 with an instruction that flushes subnormals to zero, and the
    scalar kernel takes the second zero of FP4 for -0.
    """
    ours, theirs = ours + 0.0, theirs + 0.0  # no -0
    if ours.dtype == torch.bfloat16:
        tiny = ours.float().abs() < 2.0**-126
        assert (theirs[tiny].float() - ours[tiny].float()).abs().le(2.0**-126).all()
        ours, theirs = ours[~tiny], theirs[~tiny]
    assert same_bits(ours, theirs)


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
        assert_as_bitsandbytes(W, fmt)


def test_weight_longer_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "_CHUNK", 4096)
    for shape in [(130, 64), (77, 213)]:
        for quant_type in ("nf4", "fp4"):
            assert_as_bitsandbytes(torch.randn(shape), BlockwiseFormat(quant_type, 64, True))


def special_values(quant_type: str) -> list[float]:
    """Where rounding could go either way, and the ends of float32."""
    midpoints = codebook(quant_type).midpoints()
    nextafter = torch.nextafter
    borders = torch.cat(
        [midpoints, nextafter(midpoints, midpoints + 1), nextafter(midpoints, midpoints - 1)]
    )
    extremes = [0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-149), 2.0**-126, 1.1754942e-38, 1e-38]
    largest = torch.finfo(torch.float32).max
    return borders.tolist() + extremes + [largest, -largest, 65504.0, 6e-8, -6.1e-5]


@st.composite
def adversarial_weights(draw: st.DrawFn) -> tuple[Tensor, BlockwiseFormat]:
    fmt = BlockwiseFormat(
        draw(st.sampled_from(["nf4", "fp4"])), draw(st.sampled_from([32, 64])), draw(st.booleans())
    )
    value = st.one_of(
        st.sampled_from(special_values(fmt.quant_type)),
        st.floats(width=32, allow_nan=False, allow_infinity=False),
        st.floats(-1, 1, width=32),
    )
    rows, columns = draw(st.sampled_from([(1, 70), (2, 32), (3, 33), (2, 64), (5, 26)]))
    values = draw(st.lists(value, min_size=rows * columns, max_size=rows * columns))
    scale = draw(st.sampled_from([1.0, 1.0, 0.37, 3e-39, 1e30]))
    W = torch.tensor(values, dtype=torch.float64) * scale
    W = W.clamp(-3.4e38, 3.4e38).float().view(rows, columns)
    dtype = draw(st.sampled_from(SOURCE_DTYPES))
    if dtype == torch.float16:
        W = W.clamp(-65504, 65504)
    if dtype == torch.bfloat16:
        W = W.clamp(-3.38e38, 3.38e38)
    return W.to(dtype), fmt


@settings(max_examples=100, deadline=None)
@given(adversarial_weights())
def test_adversarial_values(case: tuple[Tensor, BlockwiseFormat]) -> None:
    W, fmt = case
    spread = W.float().abs().max() - W.float().abs().min()
    if fmt.double_quant and not torch.isfinite(spread * W.numel()):
        fmt = BlockwiseFormat(fmt.quant_type, fmt.block_size)  # the sum of absmax overflows
    assert_as_bitsandbytes(W, fmt)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_tie_and_its_neighbours(quant_type: str) -> None:
    """With an absmax of 1 the scaled value is the value: ties are hit exactly."""
    values = torch.tensor([v for v in special_values(quant_type) if abs(v) <= 1])
    W = torch.nn.functional.pad(values, (0, -len(values) % 63)).view(-1, 63)
    W = torch.cat((torch.ones(len(W), 1), W), dim=1)
    assert_as_bitsandbytes(W, BlockwiseFormat(quant_type))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_zeros_stay_zeros(quant_type: str) -> None:
    for shape in [(4, 64), (3, 33), (1, 1)]:
        for double_quant in (False, True):
            W = torch.zeros(shape)
            W[-1, -1] = -0.0
            fmt = BlockwiseFormat(quant_type, 32, double_quant)
            restored = dequantize_blockwise(assert_as_bitsandbytes(W, fmt))
            assert restored.abs().max() <= 1e-38


def test_a_transposed_view_is_read_in_its_logical_order() -> None:
    W = torch.randn(96, 64)
    ours = quantize_blockwise(W.t(), BlockwiseFormat())
    assert same_bits(ours.packed, quantize_blockwise(W.t().contiguous(), BlockwiseFormat()).packed)
    assert ours.shape == (64, 96)


def test_the_dtype_to_dequantize_to_can_be_chosen() -> None:
    ours = quantize_blockwise(torch.randn(4, 64), BlockwiseFormat(), dtype=torch.bfloat16)
    assert dequantize_blockwise(ours).dtype == torch.bfloat16
    assert quantize_blockwise(torch.randn(4, 64).half(), BlockwiseFormat()).dtype == torch.float16


def test_restored_absmax_is_what_bitsandbytes_restores() -> None:
    W = torch.randn(300, 128)
    _, state = bnb.quantize_4bit(W, quant_type="nf4", compress_statistics=True)
    theirs = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert same_bits(
        restore_absmax(quantize_blockwise(W, BlockwiseFormat("nf4", 64, True))), theirs
    )


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the kernel needs AVX512"
)
@pytest.mark.parametrize("dtype", SOURCE_DTYPES)
@pytest.mark.parametrize("block_size", [32, 64, 256, 1024, 2048, 4096])
def test_where_avx512_misreads(block_size: int, dtype: torch.dtype) -> None:
    """bitsandbytes 0.50.2 dequantizes these wrongly; the day it does not, this says so."""
    generator = torch.Generator().manual_seed(0)
    for rows, columns in [(8, 96), (16, 80), (64, 16), (6, 1040), (1, 96), (4, 33), (3, 100)]:
        W = torch.randn(rows, columns, generator=generator).to(dtype)
        packed, state = bnb.quantize_4bit(W, blocksize=block_size, quant_type="nf4")
        ours = dequantize_blockwise(quantize_blockwise(W, BlockwiseFormat("nf4", block_size)))
        agrees = torch.equal(ours, bnb.dequantize_4bit(packed, state))
        assert agrees == (not avx512_misreads((rows, columns), block_size))


def test_bad_settings() -> None:
    with pytest.raises(InvalidSetting, match="block size 48 is not one of 32, 64, 128"):
        BlockwiseFormat(block_size=48)
    with pytest.raises(InvalidSetting, match="'nf5' is not one of"):
        BlockwiseFormat(quant_type="nf5")  # type: ignore[arg-type]
    with pytest.raises(InvalidSetting, match=r"\(2, 3, 4\) is not a matrix"):
        quantize_blockwise(torch.zeros(2, 3, 4), BlockwiseFormat())
    with pytest.raises(InvalidSetting, match="is empty"):
        quantize_blockwise(torch.zeros(0, 4), BlockwiseFormat())
    with pytest.raises(InvalidSetting, match="float64 is not in"):
        quantize_blockwise(torch.zeros(2, 4).double(), BlockwiseFormat())


@pytest.mark.parametrize("dtype", SOURCE_DTYPES)
def test_not_finite(dtype: torch.dtype) -> None:
    W = torch.zeros(5, 7, dtype=dtype)
    check_finite(W)
    W[3, 2], W[3, 6], W[4, 0] = math.nan, -math.inf, math.inf
    message = "3 of 35 values are NaN or infinite, the first at row 3, column 2"
    with pytest.raises(NonFiniteWeight, match=message):
        check_finite(W)
    with pytest.raises(NonFiniteWeight, match="the first at row 0, column 4"):
        check_finite(W.t())  # not contiguous
