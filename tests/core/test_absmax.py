"""The search for an absmax: compiled against readable, and both against what it promises."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given, settings
from test_blockwise import adversarial_weights, plain_dequantization
from test_kernels import assert_same
from torch import Tensor

from loftq_cli.core import absmax, residual
from loftq_cli.core.absmax import search_absmax
from loftq_cli.core.blockwise import (
    BLOCK_SIZES,
    SOURCE_DTYPES,
    BlockwiseFormat,
    QuantizedBlockwise,
    dequantize_blockwise,
    quantize_blockwise,
    restore_absmax,
)
from loftq_cli.core.codebooks import codebook
from loftq_cli.core.compiled_step import CompiledSteps
from loftq_cli.core.quantizers import Blockwise

KINDS = [("nf4", 4), ("nf4", 3), ("nf4", 2), ("fp4", 4)]
LARGEST = torch.finfo(torch.float32).max
# As SHAPES, no larger than it takes to have two of the largest blocks: the readable search is slow.
SEARCHED = [(32, 256), (7, 128), (8, 96), (3, 33), (33, 65), (1, 4500), (700, 1), (1, 1)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def block_errors(blocks: Tensor, scales: Tensor, kind: tuple[str, int]) -> Tensor:
    """Σ (t − a·c)² of every block in float64, with the nearest levels."""
    book = codebook(*kind)
    levels = book.level_tensor().double()[list(book.order)]
    choices = scales.double()[:, None] * levels
    return (blocks.double()[:, :, None] - choices[:, None, :]).square().amin(2).sum(1)


def assert_compiled_as_read(
    W: Tensor, fmt: BlockwiseFormat, previous: Tensor | None
) -> QuantizedBlockwise:
    """Returns what both gave."""
    reference = quantize_blockwise(W, fmt, search=True, previous=previous)
    like = None
    if previous is not None:
        like = replace(reference, absmax=previous, nested_absmax=None, nested_offset=None)
    rest = W.float() - dequantize_blockwise(reference).float()
    for products in (torch.float32, torch.bfloat16):
        steps = CompiledSteps(W, fmt, W.dtype, search=True, products=products)
        quantized, left = steps.quantize(like=like)
        assert_same(quantized, reference)
        assert torch.equal(left.matrix, rest.to(products))
        assert left.energy == pytest.approx(float(rest.double().square().sum()), rel=1e-12)
    return reference


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_compiled_as_read(kind: Any, block_size: int, double_quant: bool) -> None:
    fmt = BlockwiseFormat(kind[0], block_size, double_quant, kind[1])
    for number, shape in enumerate(SEARCHED):
        dtype = SOURCE_DTYPES[number % 3]
        W = (normal(*shape, seed=number) * 0.02).to(dtype)
        W.view(-1)[W.numel() // 3 : W.numel() // 3 + 2 * block_size] = 0
        previous = restore_absmax(assert_compiled_as_read(W, fmt, None))
        assert_compiled_as_read((W.float() * 1.1).to(dtype), fmt, previous)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_plain_quantization_with_fewer_levels_too(kind: Any) -> None:
    for block_size in (32, 256):
        fmt = BlockwiseFormat(kind[0], block_size, False, kind[1])
        W = normal(77, 83)
        quantized, _ = CompiledSteps(W, fmt, W.dtype).quantize()
        assert_same(quantized, quantize_blockwise(W, fmt))


@settings(max_examples=40, deadline=None)
@given(adversarial_weights())
def test_adversarial_values(case: tuple[Tensor, BlockwiseFormat]) -> None:
    W, fmt = case
    fmt = BlockwiseFormat(fmt.quant_type, fmt.block_size)
    scales = assert_compiled_as_read(W, fmt, None).absmax
    assert_compiled_as_read(W, fmt, scales.flip(0))


def test_many_pieces_make_the_same_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual, "PIECE", 2048)
    for shape in [(200, 96), (100, 33), (3, 4099)]:
        for double_quant in (False, True):
            assert_compiled_as_read(normal(*shape), BlockwiseFormat("nf4", 64, double_quant), None)


@pytest.mark.parametrize(
    ("kind", "share"),
    [(KINDS[0], 0.83), (KINDS[1], 0.74), (KINDS[2], 0.44), (KINDS[3], 0.87)],
    ids=str,
)
def test_what_it_takes_off_normal_values(kind: tuple[str, int], share: float) -> None:
    blocks = normal(3000, 64)
    searched = search_absmax(blocks, None, codebook(*kind), LARGEST)
    plain = block_errors(blocks, blocks.abs().amax(1), kind)
    left = block_errors(blocks, searched, kind)
    assert (left <= plain * (1 + 1e-6)).all()
    assert left.sum() < share * plain.sum()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_near_the_best_of_a_fine_grid(kind: tuple[str, int]) -> None:
    blocks = normal(60, 64) * 10 ** normal(60, 1)
    peak = blocks.abs().amax(1)
    grid = torch.cat([sign * torch.linspace(0.2, 1.3, 400) for sign in (1, -1)])
    best = torch.stack([block_errors(blocks, share * peak, kind) for share in grid]).amin(0)
    left = block_errors(blocks, search_absmax(blocks, None, codebook(*kind), LARGEST), kind)
    assert (left / best).mean() < 1.01
    assert (left < 1.25 * best).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_from_a_previous_absmax_it_never_gets_worse(kind: tuple[str, int]) -> None:
    blocks = normal(500, 64)
    for previous in (blocks.abs().amax(1), -0.3 * blocks.abs().amax(1), normal(500, seed=1)):
        found = search_absmax(blocks, previous, codebook(*kind), LARGEST)
        before, after = block_errors(blocks, previous, kind), block_errors(blocks, found, kind)
        assert (after <= before * (1 + 1e-6)).all()


def test_an_absmax_is_what_its_block_scales_with() -> None:
    blocks, book = normal(50, 64), codebook("nf4", 2)
    found = search_absmax(blocks, None, book, LARGEST)
    for exponent in (-100, 60):
        scale = 2.0**exponent
        assert torch.equal(search_absmax(blocks * scale, None, book, LARGEST), found * scale)


def test_none_beyond_what_the_runtime_can_hold() -> None:
    W = torch.full((1, 64), 65504.0)
    W[0, 1::2] = 60000.0
    for values in (W, -W):
        stored = quantize_blockwise(values.half(), BlockwiseFormat("nf4", 64), search=True)
        assert dequantize_blockwise(stored).isfinite().all()
    scales = search_absmax(W, None, codebook("nf4"), 65504.0)
    assert scales.abs().max() <= 65504


def test_values_too_small_to_divide_by_are_left_to_bitsandbytes() -> None:
    blocks = normal(4, 64) * 1e-40
    assert torch.equal(search_absmax(blocks, None, codebook("nf4"), LARGEST), blocks.abs().amax(1))
    assert (search_absmax(torch.zeros(2, 64), None, codebook("nf4"), LARGEST) == 0).all()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_bitsandbytes_reads_it(kind: Any, double_quant: bool) -> None:
    """Negative absmax and few levels are nothing special to it."""
    W = normal(64, 256).bfloat16()
    fmt = BlockwiseFormat(kind[0], 64, double_quant, kind[1])
    ours = quantize_blockwise(W, fmt, search=True)
    if kind[0] == "nf4":
        assert (restore_absmax(ours) < 0).any()
    codes = torch.cat((ours.packed >> 4, ours.packed & 15))
    assert set(codes.unique().tolist()) == set(codebook(*kind).order)
    packed, state = bnb.quantize_4bit(
        W, blocksize=64, quant_type=kind[0], compress_statistics=double_quant
    )
    assert packed.shape == ours.packed.shape
    state.absmax = ours.absmax
    if double_quant:
        state.state2.absmax = ours.nested_absmax
        state.offset = torch.tensor(ours.nested_offset)
    expected = dequantize_blockwise(ours)
    assert torch.equal(plain_dequantization(ours.packed, state), expected)
    assert torch.equal(bnb.dequantize_4bit(ours.packed, state), expected)


def test_codes_fit_the_absmax_that_is_read_back() -> None:
    fmt = BlockwiseFormat("nf4", 64, double_quant=True)
    W = normal(40, 256) * normal(40, 1).exp()
    stored = quantize_blockwise(W, fmt, search=True)
    left = (W - dequantize_blockwise(stored)).view(-1, 64).double().square().sum(1)
    nearest = block_errors(W.view(-1, 64), restore_absmax(stored), ("nf4", 4))
    torch.testing.assert_close(left, nearest, rtol=1e-5, atol=1e-12)


def test_the_quantizer_searches_unless_told_not_to() -> None:
    W = normal(64, 128)
    fmt = BlockwiseFormat("nf4", 64)
    searching, plain = Blockwise(fmt), Blockwise(fmt, search=False)
    assert searching.searches
    assert not plain.searches
    assert searching.plain() == plain
    assert_same(plain.steps(W).quantize()[0], quantize_blockwise(W, fmt))
    first = searching.steps(W).quantize()[0]
    assert_same(first, quantize_blockwise(W, fmt, search=True))
    again = searching.steps(W).quantize(like=first)[0]
    assert_same(again, quantize_blockwise(W, fmt, search=True, previous=first.absmax))


def test_sums_are_in_the_order_of_the_compiled_loop() -> None:
    values = normal(3, 32).numpy()
    halves = values
    while halves.shape[1] > 1:
        half = halves.shape[1] // 2
        halves = np.add(halves[:, :half], halves[:, half:], dtype=np.float32)
    assert torch.equal(absmax._sum(torch.from_numpy(values)), torch.from_numpy(halves[:, 0]))
