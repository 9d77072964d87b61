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
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loftq_cli.core.blockwise import check_finite, check_weight
from loftq_cli.core.lowrank import LowRank, check_rank, split, truncated_svd
from loftq_cli.core.quantizers import Quantized, Quantizer
from loftq_cli.errors import InvalidSetting

# Rows that are measured at a time: a chunk of 4096 float32 columns is 4 MiB.
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
    W: Tensor,
    quantizer: Quantizer,
    rank: int,
    *,
    scaling: float = 1.0,
    iterations: int = 5,
    svd: str = "auto",
    seed: int = 0,
) -> LoftqResult:
    """Run the alternation on the weight ``W`` (out × in) and return its best iterate.

    ``scaling`` is the factor that PEFT will multiply B·A with. With no iterations the weight is
    quantized and the adapter starts as PEFT's LoRA does: B = 0, A random. Everything happens on
    ``W``'s device, in float32.
    """
    check_weight(W)
    check_rank(rank, W.shape[0], W.shape[1])
    if iterations < 0:
        raise InvalidSetting(f"{iterations} iterations are not possible")
    if not scaling > 0:
        raise InvalidSetting(f"a LoRA scaling of {scaling} is not possible: it must be above 0")
    check_finite(W)
    generator = torch.Generator().manual_seed(seed)
    norm = math.sqrt(_sum_of_squares(W)) or 1.0  # an all-zero weight has errors of zero

    quantized, residual = quantizer.step(W, None)
    remaining = _sum_of_squares(residual)
    quantized_only_error = math.sqrt(remaining) / norm
    if iterations == 0:
        A, B = _plain_adapter(W, rank, generator)
        return LoftqResult(quantized, A, B, quantized_only_error, quantized_only_error, 0)

    best: tuple[float, int, Quantized, LowRank] | None = None
    errors: list[float] = []
    while True:
        low_rank = truncated_svd(residual, rank, method=svd)
        errors.append(math.sqrt(max(remaining - low_rank.energy, 0.0)) / norm)
        if best is None or errors[-1] < best[0]:
            best = (errors[-1], len(errors), quantized, low_rank)
        if len(errors) == iterations:
            break
        quantized, residual = quantizer.step(W, low_rank)
        remaining = _sum_of_squares(residual)
        if not math.isfinite(remaining):
            break  # a target outgrew the range of the runtime's dtype

    _, best_iteration, quantized, low_rank = best
    A, B = split(low_rank, scaling)
    _enliven(A, B, low_rank.S, generator)
    error = relative_error(W, quantizer.dequantize(quantized), A, B, scaling)
    errors[best_iteration - 1] = error
    return LoftqResult(quantized, A, B, error, quantized_only_error, best_iteration, errors)


@torch.no_grad()
def relative_error(W: Tensor, Q: Tensor, A: Tensor, B: Tensor, scaling: float) -> float:
    """‖W − Q − scaling·B·A‖ / ‖W‖, summed in float64."""
    total = 0.0
    for start in range(0, W.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        rest = W[rows].float() - Q[rows].float()
        total += _sum_of_squares(rest.addmm_(B[rows], A, alpha=-scaling))
    return math.sqrt(total) / (math.sqrt(_sum_of_squares(W)) or 1.0)


def _sum_of_squares(X: Tensor) -> float:
    return sum(
        float(X[start : start + _ROWS].double().square().sum())
        for start in range(0, X.shape[0], _ROWS)
    )


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
