"""Integers against a slow float64 textbook version, and against what they promise."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_blockwise import same_bits
from torch import Tensor

from loftq_cli.core import integers
from loftq_cli.core.blockwise import SOURCE_DTYPES
from loftq_cli.core.codebooks import INTEGER_BITS, LARGEST_SCALE, IntegerGrid
from loftq_cli.core.integers import (
    IntegerFormat,
    QuantizedIntegers,
    dequantize_integers,
    quantize_integers,
)
from loftq_cli.core.quantizers import Integers
from loftq_cli.errors import InvalidSetting

BLOCK_SIZES = (32, 64, 128, None)
FORMATS = [IntegerFormat(bits, size) for bits in INTEGER_BITS for size in BLOCK_SIZES]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def awkward(dtype: torch.dtype) -> Tensor:
    """Rows (14 × 384) of zeros, of one value, of all sizes, with outliers and of ties."""
    W = normal(14, 384) * 0.02
    W[0] = 0
    W[1] = 0.75
    W[2] = -W[2].abs()
    W[3, ::50] *= 300
    W[4:11] *= torch.logspace(-6, 5, 7)[:, None]
    W[11] = torch.arange(384) % 16 / 2 - 4
    W[12, 1:] = 0
    W[13] = torch.finfo(dtype).max
    return W.to(dtype)


def textbook_scales() -> np.ndarray:
    """Every value from 0 on that bfloat16 and float16 both hold, ascending: exhaustively."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    return halves[halves.view(np.uint32) % (1 << 16) == 0].astype(np.float64)


SCALES = textbook_scales()


def textbook(W: Tensor, fmt: IntegerFormat, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scales, codes) one block after the other, in float64; where two scales are as good, that
    which is ``stored``."""
    rows = W.double().numpy()
    size = fmt.block_size or W.shape[1]
    low, high = -(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1) - 1
    most = LARGEST_SCALE / -low
    scales = np.zeros((len(rows), rows.shape[1] // size))
    codes = np.zeros(rows.shape, np.int8)
    for i, row in enumerate(rows):
        for b in range(scales.shape[1]):
            block = row[b * size : b * size + size]
            ideal = min(2 * np.abs(block).max() / (2**fmt.bits - 1), most)
            distances = np.abs(SCALES - ideal)
            equal = SCALES[distances <= distances.min() * (1 + 1e-5)]
            scales[i, b] = scale = stored[i, b] if stored[i, b] in equal else equal[0]
            if scale:
                codes[i, b * size : b * size + size] = np.clip(np.round(block / scale), low, high)
    return scales, codes


def left(W: Tensor, q: QuantizedIntegers) -> Tensor:
    """Σ (w − q·scale)² of every block, in float64."""
    size = q.format.block_size or W.shape[1]
    Q = q.codes.double().view(-1, size) * q.scales.double().view(-1, 1)
    return (W.double().view(-1, size) - Q).square().sum(1)


def assert_no_worse(W: Tensor, ours: QuantizedIntegers, other: QuantizedIntegers) -> None:
    """In any block, but for float32 sums of its squares: that is how scales are compared."""
    rounding = 4e-7 * W.double().view(-1, ours.format.size(W.shape[1])).square().sum(1)
    assert (left(W, ours) <= left(W, other) * (1 + 1e-6) + rounding).all()


def assert_storable(q: QuantizedIntegers) -> None:
    assert (q.codes.dtype, q.scales.dtype) == (torch.int8, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        assert same_bits(q.scales.to(dtype).float(), q.scales)
    assert q.codes.min() >= q.format.grid.lowest
    assert q.codes.max() <= q.format.grid.highest
    assert dequantize_integers(q).isfinite().all()


@pytest.mark.parametrize("dtype", SOURCE_DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_plain_integers_are_the_textbooks(fmt: IntegerFormat, dtype: torch.dtype) -> None:
    W = awkward(dtype)
    q = quantize_integers(W, fmt)
    scales, codes = textbook(W, fmt, q.scales.double().numpy())
    assert_storable(q)
    assert (q.format, q.dtype, q.shape) == (fmt, dtype, (14, 384))
    assert np.array_equal(q.scales.numpy(), scales)
    # The reciprocal's rounding may decide a tie the other way.
    size = fmt.block_size or 384
    ideal = W.double().numpy() / np.repeat(np.where(scales == 0, 1, scales), size, axis=1)
    tie = np.abs(np.abs(ideal % 1) - 0.5) < 1e-4
    assert np.array_equal(q.codes.numpy()[~tie], codes[~tie])
    assert np.abs(q.codes.numpy().astype(int) - codes).max() <= 1


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_what_is_read_is_the_product_rounded_once(fmt: IntegerFormat) -> None:
    W = awkward(torch.float32)
    for dtype in SOURCE_DTYPES:
        for search in (False, True):
            q = quantize_integers(W, fmt, dtype=dtype, search=search)
            size = fmt.block_size or W.shape[1]
            exact = q.codes.double() * q.scales.double().repeat_interleave(size, dim=1)
            assert same_bits(dequantize_integers(q).double(), exact.to(dtype).double())


@pytest.mark.parametrize("dtype", SOURCE_DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_search_is_never_worse(fmt: IntegerFormat, dtype: torch.dtype) -> None:
    """Than none, nor than the scales it began with."""
    W = awkward(dtype)
    plain, searched = quantize_integers(W, fmt), quantize_integers(W, fmt, search=True)
    assert_storable(searched)
    assert_no_worse(W, searched, plain)
    other = fmt.grid.possible(-0.6 * searched.scales, LARGEST_SCALE)
    for previous in (searched.scales, other, plain.scales):
        before = quantize_with(W, fmt, previous)
        after = quantize_integers(W, fmt, search=True, previous=previous)
        assert_storable(after)
        assert_no_worse(W, after, before)


def quantize_with(W: Tensor, fmt: IntegerFormat, scales: Tensor) -> QuantizedIntegers:
    """The nearest codes for these scales, in float64."""
    size = fmt.block_size or W.shape[1]
    ideal = W.double().view(-1, size) / scales.double().view(-1, 1)
    ideal = ideal.nan_to_num(0.0, 0.0, 0.0).round()
    codes = ideal.clamp(fmt.grid.lowest, fmt.grid.highest).to(torch.int8)
    return QuantizedIntegers(codes.view(W.shape), scales, fmt, W.dtype)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_near_the_best_of_a_fine_grid(fmt: IntegerFormat) -> None:
    W = normal(24, 384, seed=1) * 0.02
    found = left(W, quantize_integers(W, fmt, search=True))
    size = fmt.block_size or W.shape[1]
    peak = W.view(-1, size).abs().amax(1).view(24, -1) / -fmt.grid.lowest
    best = torch.full_like(found, math.inf)
    for share in np.linspace(0.25, 1.4, 400):
        for sign in (1, -1):
            scales = fmt.grid.possible(sign * share * peak, LARGEST_SCALE)
            best = torch.minimum(best, left(W, quantize_with(W, fmt, scales)))
    # With eight bits the possible scales are few and each has an optimum of its own.
    assert found.sum() < {2: 1.005, 3: 1.01, 4: 1.02, 8: 1.25}[fmt.bits] * best.sum()


@pytest.mark.parametrize(("bits", "share"), [(2, 0.48), (3, 0.65), (4, 0.78), (8, 0.95)])
def test_what_it_takes_off_normal_values(bits: int, share: float) -> None:
    W = normal(500, 256)
    fmt = IntegerFormat(bits, 64)
    searched = quantize_integers(W, fmt, search=True)
    assert left(W, searched).sum() < share * left(W, quantize_integers(W, fmt)).sum()
    assert 0.3 < (searched.scales < 0).float().mean() < 0.7


def test_powers_of_two_scale_with_the_weight() -> None:
    W, fmt = normal(20, 128), IntegerFormat(4, 32)
    found = quantize_integers(W, fmt, search=True)
    for exponent in (-10, 9):
        scaled = quantize_integers(W * 2.0**exponent, fmt, search=True)
        assert torch.equal(scaled.codes, found.codes)
        assert torch.equal(scaled.scales, found.scales * 2.0**exponent)


@pytest.mark.parametrize("search", [False, True])
def test_beyond_what_a_scale_can_be(search: bool) -> None:
    """Too small for a scale is zero, too large is cut off: neither is an error of arithmetic."""
    for bits in INTEGER_BITS:
        fmt = IntegerFormat(bits, 64)
        tiny = quantize_integers(normal(4, 64) * 1e-12, fmt, search=search)
        assert not tiny.codes.any()
        assert not tiny.scales.any()
        huge = quantize_integers(normal(4, 64) * 1e30, fmt, search=search)
        assert_storable(huge)
        assert (huge.scales.abs() == fmt.largest_scale).all()
        assert dequantize_integers(huge).half().isfinite().all()
        half = quantize_integers(torch.full((1, 64), 65504.0).half(), fmt, search=search)
        assert_storable(half)
        error = (dequantize_integers(half).double() / 65504 - 1).abs().max()
        assert error < (0.01 if search else 0.51)


def test_the_possible_scales_are_those_of_both_dtypes() -> None:
    grid = IntegerGrid(4)
    scales = torch.from_numpy(SCALES).float()
    assert scales.max() == LARGEST_SCALE
    assert same_bits(grid.possible(scales, LARGEST_SCALE), scales)
    assert same_bits(grid.possible(-scales, LARGEST_SCALE), -scales)
    between = (scales[1:] + scales[:-1]) / 2
    for nudge, expected in ((0.999, scales[:-1]), (1.001, scales[1:])):
        assert torch.equal(grid.possible(between * nudge, LARGEST_SCALE), expected)


@st.composite
def adversarial(draw: st.DrawFn) -> tuple[Tensor, IntegerFormat]:
    size = draw(st.sampled_from([1, 2, 3, 32, 48]))
    fmt = IntegerFormat(draw(st.sampled_from(INTEGER_BITS)), draw(st.sampled_from([size, None])))
    dtype = draw(st.sampled_from(SOURCE_DTYPES))
    largest = float(torch.finfo(dtype).max)
    value = st.one_of(
        st.floats(-largest, largest, width=32),
        st.integers(-300, 300).map(lambda k: k / 8),
        st.sampled_from([0.0, -0.0, 2.0**-24, 2.0**-25, 1e-38, largest, -largest]),
    )
    count = size * draw(st.integers(1, 4))
    rows = draw(st.lists(st.lists(value, min_size=count, max_size=count), min_size=1, max_size=3))
    return torch.tensor(rows).to(dtype), fmt


@settings(max_examples=150, deadline=None)
@given(adversarial())
def test_adversarial_values(case: tuple[Tensor, IntegerFormat]) -> None:
    W, fmt = case
    plain = quantize_integers(W, fmt)
    searched = quantize_integers(W, fmt, search=True)
    for q in (plain, searched):
        assert_storable(q)
        size = fmt.size(W.shape[1])
        assert not q.codes.view(-1, size)[q.scales.view(-1) == 0].any()
    assert_no_worse(W, searched, plain)
    again = quantize_integers(W, fmt, search=True, previous=searched.scales)
    assert_no_worse(W, again, searched)


def test_in_chunks_of_rows_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    W, fmt = normal(50, 96).t().contiguous().t(), IntegerFormat(3, 32)
    whole = quantize_integers(W, fmt, search=True)
    again = quantize_integers(W, fmt, search=True, previous=whole.scales)
    monkeypatch.setattr(integers, "_CHUNK", 700)
    for previous, expected in ((None, whole), (whole.scales, again)):
        parts = quantize_integers(W, fmt, search=True, previous=previous)
        assert torch.equal(parts.codes, expected.codes)
        assert torch.equal(parts.scales, expected.scales)
        assert torch.equal(dequantize_integers(parts), dequantize_integers(expected))


def test_the_quantizer_searches_unless_told_not_to() -> None:
    W, fmt = normal(16, 128), IntegerFormat(2, 64)
    searching, plain = Integers(fmt, readable=True), Integers(fmt, readable=True, search=False)
    assert searching.searches
    assert not plain.searches
    assert searching.plain() == plain
    first = searching.steps(W).quantize()[0]
    for found, expected in (
        (plain.steps(W).quantize()[0], quantize_integers(W, fmt)),
        (first, quantize_integers(W, fmt, search=True)),
        (
            searching.steps(W).quantize(like=first)[0],
            quantize_integers(W, fmt, search=True, previous=first.scales),
        ),
        (Integers(fmt, torch.float16).quantize(W, W.dtype), quantize_with_half(W, fmt)),
    ):
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.scales, expected.scales)
        assert found.dtype == expected.dtype


def quantize_with_half(W: Tensor, fmt: IntegerFormat) -> QuantizedIntegers:
    return quantize_integers(W, fmt, dtype=torch.float16, search=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IntegerFormat(5), "integers of 5 bits are not possible: only 2, 3, 4, 8"),
        (lambda: IntegerFormat(4, 0), "block size of 0"),
        (lambda: quantize_integers(normal(4, 100), IntegerFormat(4, 64)), "rows of 100 values"),
        (lambda: quantize_integers(normal(4), IntegerFormat(4)), "not a matrix"),
    ],
)
def test_what_is_not_possible(make: Any, message: str) -> None:
    with pytest.raises(InvalidSetting, match=message):
        make()
