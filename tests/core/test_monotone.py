"""With a search the error never rises from one iterate to the next, whatever the weight."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loftq_cli.core import compiled_step, loftq
from loftq_cli.core.blockwise import BlockwiseFormat, quantize_blockwise
from loftq_cli.core.codebooks import INTEGER_BITS
from loftq_cli.core.integers import IntegerFormat
from loftq_cli.core.loftq import initialize, plain_adapter
from loftq_cli.core.lowrank import truncated_svd
from loftq_cli.core.quantizers import BlocksQuantizer, Blockwise, Integers
from loftq_cli.core.residual import Residual
from loftq_cli.core.steps import Factors
from loftq_cli.errors import InvalidSetting


def outliers(W: Tensor) -> Tensor:
    W.view(-1)[:: max(W.numel() // 7, 1)] *= 300
    return W


def constant_rows(W: Tensor) -> Tensor:
    W[::2] = W[::2, :1]
    return W


def zeros(W: Tensor) -> Tensor:
    W[: len(W) // 2 + 1] = 0
    return W


def low_rank(W: Tensor) -> Tensor:
    return W[:, :1] * W[:1]


def rows_of_all_sizes(W: Tensor) -> Tensor:
    return W * torch.logspace(-6, 3, len(W))[:, None]


WEIGHTS = {
    "random": lambda W: W,
    "one value": torch.ones_like,
    "tiny": lambda W: W * 1e-30,
    "subnormal": lambda W: W * 1e-39,
    "huge": lambda W: W * 1e30,
    **{f.__name__: f for f in (outliers, constant_rows, zeros, low_rank, rows_of_all_sizes)},
}
SHAPES = [(1, 1), (1, 70), (33, 65), (40, 96), (96, 40), (70, 3), (260, 300)]


def quantizers(columns: int) -> st.SearchStrategy[BlocksQuantizer]:
    """All that search, for rows of so many values."""
    sizes = [size for size in (32, 64, None) if columns % (size or columns) == 0]
    return st.one_of(
        st.builds(
            lambda kind, size, double: Blockwise(BlockwiseFormat(kind[0], size, double, kind[1])),
            st.sampled_from([("nf4", 4), ("nf4", 3), ("nf4", 2), ("fp4", 4)]),
            st.sampled_from([32, 64, 256]),
            st.booleans(),
        ),
        st.builds(
            lambda bits, size: Integers(IntegerFormat(bits, size)),
            st.sampled_from(INTEGER_BITS),
            st.sampled_from(sizes),
        ),
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, BlocksQuantizer, dict[str, Any]]:
    shape = draw(st.sampled_from(SHAPES))
    quantizer = draw(quantizers(shape[1]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    W = WEIGHTS[draw(st.sampled_from(sorted(WEIGHTS)))](torch.randn(shape, generator=generator))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    W = (W.clamp(-6e4, 6e4) if dtype == torch.float16 else W).to(dtype)
    settings = {
        "rank": draw(st.integers(1, min(*shape, 24))),
        "iterations": draw(st.sampled_from([1, 2, 6, None])),
        "start": draw(st.sampled_from(["zero", "weight"])),
        "svd": draw(st.sampled_from(["auto", "exact"])),
    }
    return W, quantizer, settings


@settings(max_examples=60, deadline=None)
@given(cases())
def test_the_error_never_rises(case: tuple[Tensor, BlocksQuantizer, dict[str, Any]]) -> None:
    W, quantizer, options = case
    result = initialize(W, quantizer, **options)
    assert result.errors == sorted(result.errors, reverse=True)
    assert 1 <= result.best_iteration == len(result.errors) <= (options["iterations"] or 50)
    assert result.error == result.errors[-1]
    Q = quantizer.dequantize(result.quantized)
    assert math.isfinite(result.error)
    if W.float().abs().max() > 1e-30:
        rest = W.double() - Q.double() - result.lora_B.double() @ result.lora_A.double()
        measured = float(rest.norm() / W.double().norm())
        assert measured == pytest.approx(result.error, rel=1e-4, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(cases())
def test_no_step_raises_the_error(case: tuple[Tensor, BlocksQuantizer, dict[str, Any]]) -> None:
    """Each is one of its own: what rose is thrown away by the alternation, which would hide it."""
    W, quantizer, options = case
    if quantizer.rounds_together:
        quantizer = replace(quantizer, format=replace(quantizer.format, double_quant=False))
    generator = torch.Generator().manual_seed(1)
    # What the search compares is rounded afterwards: to the runtime's dtype, and in float32 sums.
    rounding = max(torch.finfo(W.dtype).eps, 1e-5) * float(W.double().norm())
    steps = quantizer.steps(W)
    latest, residual = steps.quantize()
    for _ in range(4):
        if not math.isfinite(residual.energy) or W.float().abs().max() < 1e-30:
            return  # absmax that cannot be divided by have no search
        like = truncated_svd(residual, options["rank"], method="exact", generator=generator)
        carried = Factors(like.U * like.S, like.Vh)
        before = math.sqrt(steps.remainder(latest, carried))
        latest, residual = steps.quantize(carried, latest)
        after = math.sqrt(steps.remainder(latest, carried))
        assert after <= before + rounding


@pytest.mark.parametrize("products", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("start", ["zero", "weight"])
def test_nor_with_rounded_products(
    start: str, products: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_step, "product_dtype", lambda: products)
    torch.manual_seed(0)
    W = torch.randn(192, 256) + 0.2 * torch.randn(192, 20) @ torch.randn(20, 256)
    for quantizer in (
        Blockwise(BlockwiseFormat("nf4", 64, True)),
        Blockwise(BlockwiseFormat("nf4", 64, bits=2)),
        Integers(IntegerFormat(2, 64)),
        Integers(IntegerFormat(8, None)),
    ):
        result = initialize(W, quantizer, 16, start=start, svd="randomized", iterations=16)
        assert len(result.errors) > 5
        assert result.errors == sorted(result.errors, reverse=True)


def test_steps_that_are_too_long_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    W = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    calm = initialize(W, Blockwise(BlockwiseFormat()), 8, iterations=8, svd="exact")
    monkeypatch.setattr(loftq, "MONOTONE_MOMENTUM", (3.0, 2.0))
    wild = initialize(W, Blockwise(BlockwiseFormat()), 8, iterations=8, svd="randomized")
    assert wild.errors == sorted(wild.errors, reverse=True)
    assert wild.error == pytest.approx(calm.error, rel=0.02)


@pytest.mark.parametrize(
    "quantizer",
    [
        *(Blockwise(BlockwiseFormat("nf4", 64, bits=bits)) for bits in (2, 3, 4)),
        *(Integers(IntegerFormat(bits, 64)) for bits in (2, 3, 4)),
    ],
    ids=lambda quantizer: f"{type(quantizer).__name__}-{quantizer.format.bits}",
)
@pytest.mark.parametrize("start", ["zero", "weight"])
def test_below_the_published_algorithm(start: str, quantizer: BlocksQuantizer) -> None:
    torch.manual_seed(quantizer.format.bits)
    W = torch.randn(256, 384) + 0.2 * torch.randn(256, 20) @ torch.randn(20, 384)
    published = initialize(W, quantizer.plain(), 8, iterations=5, svd="exact")
    ours = initialize(W, quantizer, 8, start=start)
    assert ours.error < 0.92 * published.error
    assert ours.quantized_only_error == published.quantized_only_error


def test_it_ends_when_another_iterate_is_not_worth_it() -> None:
    torch.manual_seed(0)
    W, quantizer = torch.randn(256, 192), Blockwise(BlockwiseFormat())
    result = initialize(W, quantizer, 8)
    gains = [1 - b / a for a, b in zip(result.errors, result.errors[1:], strict=False)]
    assert 3 < len(result.errors) < loftq.MOST_ITERATIONS
    assert all(gain >= loftq.ENOUGH for gain in gains[:-1])
    assert gains[-1] < loftq.ENOUGH * 1.01
    longer = initialize(W, quantizer, 8, iterations=30)
    assert longer.error < result.error < 1.03 * longer.error


def test_started_from_the_weight_without_iterations() -> None:
    """What PiSSA keeps of the weight is carried, the rest is quantized."""
    W = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    quantizer = Blockwise(BlockwiseFormat(), search=False)
    result = initialize(W, quantizer, 4, iterations=0, start="weight", scaling=2.0)
    kept = truncated_svd(Residual.of(W), 4, method="exact").dense()
    torch.testing.assert_close(2.0 * result.lora_B @ result.lora_A, kept, rtol=1e-4, atol=1e-5)
    rest = quantize_blockwise(W - kept, quantizer.format)
    assert (rest.packed != result.quantized.packed).float().mean() < 0.01
    assert (result.errors, result.best_iteration) == ([], 0)
    assert result.error < result.quantized_only_error


def test_an_unknown_start() -> None:
    with pytest.raises(InvalidSetting, match="start 'svd' is not one of zero, weight"):
        initialize(torch.randn(8, 8), Blockwise(BlockwiseFormat()), 2, start="svd")


def test_a_plain_adapter_is_lora_s_own() -> None:
    A, B = plain_adapter((7, 12), 3, seed=4)
    assert (A.shape, B.shape) == ((3, 12), (7, 3))
    assert torch.equal(A, plain_adapter((7, 12), 3, seed=4)[0])
    assert 0 < A.abs().max() <= 12**-0.5
    assert (B == 0).all()
