"""LoftQ: the quantized weight and the LoRA adapter of one layer, chosen together.

QLoRA quantizes a weight and lets training start from W ≈ Q, with B·A = 0. LoftQ (Algorithm 1 of
arXiv 2310.08659) looks for the codes and the rank-r correction that are nearest to W *together*,

    minimize ‖W − Q − s·B·A‖        W (out × in), B (out × r), A (r × in), s = lora_alpha / r

by doing one with the other held fixed, in turn, from B₀·A₀ = 0:

    Q_t      = q(W − s·B_{t−1}·A_{t−1})     quantize what the low rank does not carry
    B_t, A_t = SVD_r(W − Q_t)               and carry what the quantization lost

The second step is optimal for its Q (Eckart and Young). The first is not optimal for its B·A,
since rounding by blocks minimizes no norm of the whole, so the error may rise from one iterate to
the next: all are recorded and the best is kept.

The error is always that of what will be loaded: Q is what the stored codes dequantize to, rounded
to the dtype of the runtime, and s·B·A is formed from the float32 adapter that is returned.

With ``svd="exact"`` that is all, and what PEFT does. Otherwise an SVD is a few products with what
the last one found (``lowrank.py``), and the steps are longer: each moves few codes, and mostly the
same way as the one before, so what is quantized is W − (L_t + μ·(L_t − L_{t−1})), with L = s·B·A.
Any target may be, since the SVD that follows fits what came of it. Five such steps end below five
of the plain algorithm, by 0.1 to 7 % on the weights that were tried.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from loftq_cli.core.blockwise import check_finite, check_weight
from loftq_cli.core.lowrank import LowRank, check_rank, split, truncated_svd
from loftq_cli.core.parallel import one_thread_each
from loftq_cli.core.quantizers import Product, Quantized, Quantizer
from loftq_cli.core.residual import (
    rows_a_piece,
    rows_times,
    sum_of_squares,
    transposed_times,
)
from loftq_cli.core.sketches import takes_exact
from loftq_cli.core.streamed import RowsOnDemand
from loftq_cli.errors import InvalidSetting, NonFiniteWeight

# Of 0.4 to 0.7 the best for most weights. It overshoots where the rank is most of the matrix's, and
# is left out from half of it on.
MOMENTUM = 0.6
# What another pass of the SVD must take off the square of the error: while there are more steps to
# come, and at the end.
_UNDERWAY, _AT_THE_END = 5e-3, 2e-4
# Rows that are measured at a time.
_ROWS = 256


@dataclass(frozen=True)
class LoftqResult:
    """One layer's start. Errors are relative: ‖W − Q − s·B·A‖ / ‖W‖, Frobenius."""

    quantized: Quantized
    lora_A: Tensor  # float32 (r, in)
    lora_B: Tensor  # float32 (out, r)
    error: float  # of the three above, measured on them
    quantized_only_error: float  # ‖W − q(W)‖ / ‖W‖: what plain quantization leaves
    best_iteration: int  # counted from 1; 0 when there was none
    errors: list[float] = field(default_factory=list)  # of every iterate


@torch.no_grad()
def initialize(
    W: Tensor | RowsOnDemand,
    quantizer: Quantizer,
    rank: int,
    *,
    scaling: float = 1.0,
    iterations: int = 5,
    svd: str = "auto",
    momentum: float | None = None,
    seed: int = 0,
) -> LoftqResult:
    """Run the alternation on the weight ``W`` (out × in) and return its best iterate.

    ``scaling`` is the factor that PEFT will multiply B·A with. With no iterations the weight is
    quantized and the adapter starts as PEFT's LoRA does: B = 0, A random. Everything happens on
    ``W``'s device. Rows on demand give the bits that the weight in memory gives; an exact SVD
    gathers them first.

    The same arguments give the same bits on the same machine, however many threads there are, with
    two exceptions: LAPACK's have a say in the last bits of an exact SVD, and torch's in the offset
    of double quantization, as they have in bitsandbytes' own.
    """
    check_weight(W)
    rows: int | None = None
    check_rank(rank, W.shape[0], W.shape[1])
    if iterations < 0:
        raise InvalidSetting(f"{iterations} iterations are not possible")
    if not scaling > 0:
        raise InvalidSetting(f"a LoRA scaling of {scaling} is not possible: it must be above 0")
    if isinstance(W, RowsOnDemand):
        exact = iterations > 0 and takes_exact((W.shape[0], W.shape[1]), rank, svd)
        if exact or not quantizer.takes_rows(W):
            W = W.whole()
        else:
            W = cast(Tensor, W)  # as far as it is used as one from here on
            rows = rows_a_piece(W.shape[0], W.shape[1])
    else:
        W = W.detach().contiguous()  # a transposed view would be gathered anew in every pass
    check_finite(W, rows)
    if momentum is None:
        momentum = 0.0 if svd == "exact" or 2 * rank > min(W.shape) else MOMENTUM
    with nullcontext() if svd == "exact" else one_thread_each():
        return _alternate(W, quantizer, rank, scaling, iterations, svd, momentum, seed)


def _alternate(
    W: Tensor,
    quantizer: Quantizer,
    rank: int,
    scaling: float,
    iterations: int,
    svd: str,
    momentum: float,
    seed: int,
) -> LoftqResult:
    generator = torch.Generator().manual_seed(seed)
    norm = math.sqrt(sum_of_squares(W)) or 1.0  # an all-zero weight has errors of zero
    fast = not takes_exact(W.shape, rank, svd)
    quantized, residual = quantizer.step(W, None, fast=fast)
    if not math.isfinite(residual.energy):
        raise NonFiniteWeight("the quantized values overflow the dtype of the runtime")
    quantized_only_error = math.sqrt(residual.energy) / norm
    if iterations == 0:
        A, B = _plain_adapter(W, rank, generator)
        return LoftqResult(quantized, A, B, quantized_only_error, quantized_only_error, 0)

    best: tuple[int, Quantized, LowRank] | None = None
    errors: list[float] = []
    previous: LowRank | None = None
    while math.isfinite(residual.energy):  # else a target outgrew the range of the runtime's dtype
        last = len(errors) + 1 == iterations
        low_rank = truncated_svd(
            residual,
            rank,
            method=svd,
            start=previous.subspace if previous else None,
            tolerance=_AT_THE_END if last else _UNDERWAY,
            generator=generator,
        )
        errors.append(math.sqrt(max(residual.energy - low_rank.energy, 0.0)) / norm)
        if best is None or errors[-1] < errors[best[0] - 1]:
            best = len(errors), quantized, low_rank
        else:
            momentum = 0.0  # the steps became too long
        if last:
            break
        carried = _ahead(low_rank, previous, momentum)
        quantized, residual = quantizer.step(
            W, carried, probe=low_rank.subspace, fast=fast, spare=residual
        )
        previous = low_rank

    assert best is not None
    best_iteration, quantized, low_rank = best
    A, B = split(low_rank, scaling)
    _enliven(A, B, low_rank.S, generator)
    error = math.sqrt(quantizer.remainder(W, quantized, (scaling * B, A))) / norm
    errors[best_iteration - 1] = error
    return LoftqResult(quantized, A, B, error, quantized_only_error, best_iteration, errors)


def _ahead(low_rank: LowRank, previous: LowRank | None, momentum: float) -> Product:
    """L_t + μ·(L_t − L_{t−1}), the older one projected on the range of the newer, from L_0 = 0."""
    left, right = low_rank.U, low_rank.S[:, None] * low_rank.Vh
    if momentum == 0:
        return left, right
    right *= 1 + momentum
    if previous is not None:
        turned = transposed_times(left, previous.U).to(left) * previous.S
        right -= momentum * rows_times(previous.Vh.t(), turned.t()).t()
    return left, right


@torch.no_grad()
def relative_error(W: Tensor, Q: Tensor, A: Tensor, B: Tensor, scaling: float) -> float:
    """‖W − Q − scaling·B·A‖ / ‖W‖, for Q as it was read back from wherever."""
    rest = 0.0
    for start in range(0, W.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        rest += sum_of_squares(
            (W[rows].float() - Q[rows].float()).addmm_(B[rows], A, alpha=-scaling)
        )
    return math.sqrt(rest) / (math.sqrt(sum_of_squares(W)) or 1.0)


def _plain_adapter(W: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """PEFT's start of a LoRA adapter: A Kaiming-uniform with a = √5, B zero."""
    bound = 1 / math.sqrt(W.shape[1])
    A = torch.empty(rank, W.shape[1]).uniform_(-bound, bound, generator=generator)
    return A.to(W.device), torch.zeros(W.shape[0], rank, device=W.device)


def _enliven(A: Tensor, B: Tensor, S: Tensor, generator: torch.Generator) -> None:
    """Give directions that carry nothing a random row of A, so that they can be trained.

    Where a singular value is zero both halves of the balanced split are, and no gradient would
    ever reach either. B is zero there, so the product is the same to rounding.
    """
    dead = S.le(torch.finfo(torch.float32).eps * S[0])
    if dead.any():
        A[dead] = _plain_adapter(A, A.shape[0], generator)[0][dead]
        B[:, dead] = 0.0
