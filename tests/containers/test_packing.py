"""Codes as bits, against numbers written one bit at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loftq_cli.containers import packing

WIDTHS = (2, 3, 4, 8)


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> torch.Tensor:
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)


def bit_by_bit(row: list[int], bits: int) -> list[int]:
    """The words of one row, as a very large number."""
    whole = sum((code + (1 << (bits - 1))) << (bits * place) for place, code in enumerate(row))
    unsigned = [whole >> 32 * word & 0xFFFFFFFF for word in range(len(row) * bits // 32)]
    return [word - (word >> 31 << 32) for word in unsigned]


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_row_is_one_stream_of_bits(bits: int) -> None:
    codes = random_codes(5, 96, bits)
    packed = packing.pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (5, packing.words(96, bits))
    assert packed.tolist() == [bit_by_bit(row, bits) for row in codes.tolist()]


@settings(deadline=None)
@given(st.sampled_from(WIDTHS), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31))
def test_both_readings_give_the_codes_back(bits: int, rows: int, groups: int, seed: int) -> None:
    codes = random_codes(rows, groups * packing.GROUP, bits, seed)
    packed = packing.pack(codes, bits)
    assert torch.equal(packing.unpack(packed, bits), codes)
    numbers = packing.numbers_of_words(packed, bits)
    assert torch.equal(numbers - (1 << (bits - 1)), codes.int())
    # And out of a transposed view, as GPTQ's files have it.
    assert torch.equal(packing.unpack(packed.t().contiguous().t(), bits), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_at_every_place(bits: int) -> None:
    half = 1 << (bits - 1)
    for code in range(-half, half):
        codes = torch.full((1, packing.GROUP), -half, dtype=torch.int8)
        for place in range(packing.GROUP):
            codes[0, place] = code
            assert torch.equal(packing.unpack(packing.pack(codes, bits), bits), codes)
            codes[0, place] = -half


@pytest.mark.parametrize(
    ("count", "each", "multiple"), [(1, 1 << 22, 1), (5000, 4096, 1), (96, 1 << 19, 32)]
)
def test_pieces_cover_all_in_order(count: int, each: int, multiple: int) -> None:
    pieces = list(packing.chunks(count, each, multiple))
    assert [place for piece in pieces for place in range(count)[piece]] == list(range(count))
    assert all(piece.start % multiple == 0 for piece in pieces)
    assert len(pieces) == 1 or (pieces[0].stop - pieces[0].start) * each <= max(
        1 << 20, multiple * each
    )
