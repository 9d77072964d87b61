"""What an adapter of any rank brings back of a quantization's error, from one decomposition.

With one iteration Q = q(W) does not depend on the rank, and the best correction of rank r of the
residual R = W − Q is its truncated SVD, so what remains is known for every r at once:

    ‖W − Q − B·A‖² = ‖R‖² − Σ_{i≤r} σᵢ²

With the second moments G = E[x·xᵀ] of the layer's inputs, the same is known of its outputs. The
correction that is best for them is U_r·U_rᵀ·R, with U the left singular vectors of R·S, S·Sᵀ = G
(`input_moments.py`), and whatever S they were found with, what they leave is

    E‖(R − U_r·U_rᵀ·R)·x‖² = tr(R·G·Rᵀ) − Σ_{i≤r} uᵢᵀ·R·G·Rᵀ·uᵢ

So the errors of outputs are exact for a correction that was found with slightly damped moments.
:func:`rank_errors` gives these for one layer; by :func:`error_shares` bits and ranks are spread
over the layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.core.blockwise import check_finite, check_weight
from loftq_cli.core.input_moments import DampedMoments, check_moments, output_energy
from loftq_cli.core.lowrank import truncated_svd
from loftq_cli.core.residual import Residual, rows_times, sum_of_squares, transposed_times
from loftq_cli.core.steps import Quantizer

# The curve is the result here, and is not iterated on: with this, a randomized SVD's is within
# 5e-4 of the exact one's at the largest rank, and much nearer at the others.
TOLERANCE = 1e-5
# Added to the moments' diagonal, as a share of its mean, more where Cholesky needs it.
_DAMPING = 1e-5


@dataclass(frozen=True)
class Curve:
    """Norms, not relative: they add up over layers as squares."""

    whole: float  # ‖W‖, or √E‖W·x‖²
    quantized_only: float  # the same of what plain quantization leaves
    uncorrected: float  # of what Q leaves, which is searched for where the quantizer does that
    by_rank: list[float]  # of what is left of that, in the order the ranks were given

    @classmethod
    def together(cls, curves: Sequence["Curve"], ranks: int) -> "Curve":
        """That of all layers taken as one long vector, relative to it; some may have no ranks."""
        whole = math.hypot(*(each.whole for each in curves)) or 1.0  # zeros have no error
        quantized_only = math.hypot(*(each.quantized_only for each in curves))
        uncorrected = math.hypot(*(each.uncorrected for each in curves))
        every = [each.by_rank or [each.uncorrected] * ranks for each in curves]
        by_rank = [math.hypot(*left) / whole for left in zip(*every, strict=True)]
        return cls(1.0, quantized_only / whole, uncorrected / whole, by_rank)


@dataclass(frozen=True)
class RankErrors:
    """``outputs`` is None without moments. Each curve is of the corrections best for it."""

    weights: Curve
    outputs: Curve | None = None


@torch.no_grad()
def rank_errors(
    W: Tensor, quantizer: Quantizer, ranks: Sequence[int], input_moments: Tensor | None = None
) -> RankErrors:
    """The errors of the weight ``W`` (out × in); no ranks, no decomposition.

    A rank above min(out, in) leaves what the full rank leaves.
    """
    check_weight(W)
    check_finite(W)
    if input_moments is not None:
        check_moments(input_moments, W.shape)
        input_moments = input_moments.to(W.device)
    residual = quantizer.steps(W).quantize()[1]
    plain = quantizer.plain().steps(W).quantize()[1] if quantizer.searches else residual
    weights = Curve(
        math.sqrt(sum_of_squares(W)),
        math.sqrt(plain.energy),
        math.sqrt(residual.energy),
        _remaining(residual.energy, _decompose(residual, ranks)[1], ranks),
    )
    if input_moments is None:
        return RankErrors(weights)
    return RankErrors(weights, _outputs(W, plain.matrix, residual.matrix, ranks, input_moments))


@dataclass(frozen=True)
class ErrorShares:
    """What quantizing does to what a layer puts out, as shares of the energy of that."""

    quantized_only: float  # what quantizing takes away
    captured: tuple[float, ...]  # what each direction of an adapter brings back, descending

    def times(self, count: int) -> "ErrorShares":
        """The same of a layer that counts so many times."""
        return ErrorShares(
            count * self.quantized_only, tuple(count * each for each in self.captured)
        )


@torch.no_grad()
def error_shares(
    W: Tensor,
    quantizers: Sequence[Quantizer],
    rank: int,
    *,
    input_moments: Tensor | None = None,
    seed: int = 0,
) -> list[ErrorShares]:
    """What the weight ``W`` (out × in) loses with each quantizer, and at every rank gets back.

        quantized_only = ‖R·S‖² / ‖W·S‖²    captured[i] = σᵢ(R·S)² / ‖W·S‖²    R = W − Q, i ≤ rank

    S is the root of the damped ``input_moments``; without them inputs count as independent and all
    alike, S = 1. No rank, no decomposition.
    """
    check_weight(W)
    check_finite(W)
    inputs = None
    if input_moments is not None:
        check_moments(input_moments, W.shape)
        inputs = DampedMoments.of(input_moments.to(W.device))
    norm = sum_of_squares(W if inputs is None else rows_times(W.float(), inputs.root)) or 1.0
    found = []
    for quantizer in quantizers:
        _, residual = quantizer.steps(W).quantize()
        if inputs is not None:
            residual = Residual.of(rows_times(residual.matrix, inputs.root))
        captured: tuple[float, ...] = ()
        if rank:
            generator = torch.Generator().manual_seed(seed)
            svd = truncated_svd(residual, min(rank, *W.shape), generator=generator)
            captured = tuple((svd.S.double().square() / norm).tolist())
        found.append(ErrorShares(residual.energy / norm, captured))
    return found


def _outputs(
    W: Tensor, plain: Tensor, R: Tensor, ranks: Sequence[int], input_moments: Tensor
) -> Curve:
    energy = output_energy(R, input_moments)
    removed = torch.zeros(0, dtype=torch.float64)
    if ranks:
        weighted = Residual.of(rows_times(R, DampedMoments.of(input_moments, _DAMPING).root))
        U, _ = _decompose(weighted, ranks)
        Y = transposed_times(U, R).to(R)
        removed = (Y @ input_moments).mul_(Y).sum(dim=1, dtype=torch.float64).cpu()
    return Curve(
        math.sqrt(output_energy(W.float(), input_moments)),
        math.sqrt(output_energy(plain, input_moments)),
        math.sqrt(energy),
        _remaining(energy, removed, ranks),
    )


def _decompose(residual: Residual, ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(U, σ²) up to the largest of the ranks."""
    if not ranks:
        return residual.matrix[:, :0], torch.zeros(0, dtype=torch.float64)
    svd = truncated_svd(
        residual,
        min(max(ranks), *residual.shape),
        generator=torch.Generator().manual_seed(0),
        tolerance=TOLERANCE,
    )
    return svd.U, svd.S.double().square().cpu()


def _remaining(energy: float, removed: Tensor, ranks: Sequence[int]) -> list[float]:
    """√(energy − what so many directions take away of it), for each rank."""
    sums = removed.cumsum(0).tolist()
    return [math.sqrt(max(energy - sums[min(rank, len(sums)) - 1], 0.0)) for rank in ranks]
