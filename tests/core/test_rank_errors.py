"""The error at many ranks from one decomposition, against the whole SVD in float64."""

from __future__ import annotations

import pytest
import torch

from loftq_cli.core.blockwise import BlockwiseFormat
from loftq_cli.core.int8 import dequantize_int8, quantize_int8
from loftq_cli.core.integers import IntegerFormat
from loftq_cli.core.quantizers import Blockwise, Int8, Integers
from loftq_cli.core.rank_errors import rank_errors
from loftq_cli.core.steps import Quantizer
from loftq_cli.errors import NonFiniteWeight

NF4 = Blockwise(BlockwiseFormat("nf4", 64))
RANKS = [1, 16, 4, 64, 128]


def weight(rows: int, columns: int) -> torch.Tensor:
    torch.manual_seed(rows)
    return torch.randn(rows, columns) * torch.rand(rows, 1)


@pytest.mark.parametrize(
    "quantizer", [NF4, Int8(), Integers(IntegerFormat(4, 32)), Integers(IntegerFormat(2))], ids=str
)
@pytest.mark.parametrize("shape", [(128, 192), (512, 384)])
def test_against_float64(quantizer: Quantizer, shape: tuple[int, int]) -> None:
    W = weight(*shape)
    R = left_by(quantizer, W)
    squares = torch.linalg.svdvals(R).square()
    found = rank_errors(W, quantizer, RANKS)
    errors = found.weights
    assert found.outputs is None
    assert errors.whole == pytest.approx(float(W.double().norm()), rel=1e-6)
    plain = float(left_by(quantizer.plain(), W).norm())
    assert errors.quantized_only == pytest.approx(plain, rel=1e-6)
    assert errors.uncorrected == pytest.approx(float(R.norm()), rel=1e-6)
    for rank, error in zip(RANKS, errors.by_rank, strict=True):
        left = float(squares[rank:].sum()) ** 0.5
        assert error == pytest.approx(left, rel=1e-3, abs=1e-3 * errors.quantized_only)


def left_by(quantizer: Quantizer, W: torch.Tensor) -> torch.Tensor:
    """W − Q in float64."""
    if isinstance(quantizer, Int8):
        return W.double() - dequantize_int8(quantize_int8(W)).double()
    return W.double() - quantizer.dequantize(quantizer.steps(W).quantize()[0]).double()


@pytest.mark.parametrize("shape", [(128, 192), (256, 128)])
@pytest.mark.parametrize("tokens", [40, 4000])
def test_outputs_against_float64(shape: tuple[int, int], tokens: int) -> None:
    """QERA with its square root, also of inputs that are fewer than the layer has."""
    W = weight(*shape)
    x = torch.randn(tokens, shape[1]) @ torch.randn(shape[1], shape[1]) * torch.rand(shape[1])
    G = (x.T @ x / tokens).double()
    values, vectors = torch.linalg.eigh(G)
    root = vectors * values.clamp(min=0).sqrt()
    R = left_by(NF4, W)
    squares = torch.linalg.svdvals(R @ root).square()
    found = rank_errors(W, NF4, RANKS, G.float())
    errors = found.outputs
    assert errors is not None
    assert found.weights == rank_errors(W, NF4, RANKS).weights
    assert errors.whole == pytest.approx(float((W.double() @ root).norm()), rel=1e-5)
    plain = float((left_by(NF4.plain(), W) @ root).norm())
    assert errors.quantized_only == pytest.approx(plain, rel=1e-4)
    assert errors.uncorrected == pytest.approx(float((R @ root).norm()), rel=1e-4)
    for rank, error in zip(RANKS, errors.by_rank, strict=True):
        left = float(squares[rank:].sum()) ** 0.5
        assert error == pytest.approx(left, rel=2e-3, abs=1e-3 * errors.quantized_only)


def test_inputs_that_were_never_seen_have_no_errors_of_outputs() -> None:
    errors = rank_errors(weight(64, 128), NF4, [4], torch.zeros(128, 128)).outputs
    assert errors is not None
    assert (errors.whole, errors.quantized_only, errors.by_rank) == (0.0, 0.0, [0.0])


def test_without_ranks_nothing_is_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loftq_cli.core.rank_errors.truncated_svd", None)
    errors = rank_errors(weight(64, 128), NF4, []).weights
    assert errors.by_rank == []
    assert errors.quantized_only > 0


def test_one_decomposition_for_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    from loftq_cli.core import rank_errors as module

    calls = []
    original = module.truncated_svd

    def counted(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        return original(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "truncated_svd", counted)
    rank_errors(weight(128, 128), NF4, RANKS)
    assert len(calls) == 1


def test_a_rank_beyond_the_shape_leaves_nothing() -> None:
    errors = rank_errors(weight(64, 128), NF4, [64, 1000]).weights
    assert errors.by_rank[0] == errors.by_rank[1]
    assert errors.by_rank[0] < 1e-3 * errors.quantized_only


def test_an_all_zero_weight() -> None:
    errors = rank_errors(torch.zeros(64, 128), NF4, [4]).weights
    assert (errors.whole, errors.quantized_only, errors.by_rank) == (0.0, 0.0, [0.0])


def test_not_a_number_is_refused() -> None:
    W = weight(64, 64)
    W[1, 2] = float("nan")
    with pytest.raises(NonFiniteWeight):
        rank_errors(W, NF4, [4])
