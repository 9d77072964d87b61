"""Vectorwise int8 against bitsandbytes on the CPU."""

import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loftq_cli.core.blockwise import SOURCE_DTYPES
from loftq_cli.core.int8 import dequantize_int8, quantize_int8


def assert_as_bitsandbytes(W: Tensor) -> None:
    codes, scb, _ = bnb.int8_vectorwise_quant(W.clone())
    ours = quantize_int8(W)
    assert torch.equal(ours.codes, codes)
    assert ours.codes.dtype == torch.int8
    assert torch.equal(ours.scb, scb)
    assert ours.scb.dtype == torch.float32
    theirs = bnb.int8_vectorwise_dequant(codes, scb)
    assert torch.equal(dequantize_int8(ours), theirs)
    assert ours.codes.shape == W.shape


@pytest.mark.parametrize("dtype", SOURCE_DTYPES)
@pytest.mark.parametrize("shape", [(64, 96), (1, 333), (333, 1), (1, 1), (7, 129)])
def test_shapes_and_dtypes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert_as_bitsandbytes((torch.randn(shape) * 0.02).to(dtype))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-4, 4, width=32), min_size=24, max_size=24), st.sampled_from([1, 1e-30]))
def test_any_values(values: list[float], scale: float) -> None:
    W = torch.tensor(values).view(3, 8) * scale
    W[:, 0] = torch.tensor([1.0, 0.5, 127.0]) * scale  # no row so small that bitsandbytes overflows
    assert_as_bitsandbytes(W)


def test_ties_go_to_the_even_code() -> None:
    W = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]])
    assert quantize_int8(W).codes.tolist() == [[127, 0, 2, 2, 0, -2, -126]]
    assert_as_bitsandbytes(W)


@pytest.mark.parametrize("dtype", SOURCE_DTYPES)
def test_rows_of_zeros_come_back_as_zeros(dtype: torch.dtype) -> None:
    W = torch.randn(4, 32).to(dtype)
    W[1], W[3] = 0, -0.0
    ours = quantize_int8(W)
    assert (ours.codes[[1, 3]] == 0).all()
    assert (ours.scb[[1, 3]] == 0).all()
    restored = dequantize_int8(ours)
    assert (restored[[1, 3]] == 0).all()
    assert torch.equal(restored[[0, 2]], dequantize_int8(quantize_int8(W[[0, 2]])))
    # And what is stored is safe to load: bitsandbytes reads the same zeros.
    assert torch.equal(bnb.int8_vectorwise_dequant(ours.codes, ours.scb), restored)


def test_subnormal_rows_are_quantized_like_any_other() -> None:
    row = torch.tensor([1.0, -0.5, 0.25, 0.0])
    ours = quantize_int8(row[None] * 2.0**-128)
    assert ours.codes.tolist() == [[127, -64, 32, 0]]
    assert dequantize_int8(ours)[0].tolist() == pytest.approx((row * 2.0**-128).tolist(), abs=1e-40)
