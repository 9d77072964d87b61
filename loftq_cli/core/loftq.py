"""LoftQ: the quantized weight and the LoRA adapter of one layer, chosen together.

QLoRA quantizes a weight and lets training start from W ≈ Q, with B·A = 0. LoftQ (Algorithm 1 of
arXiv 2310.08659) looks for the codes and the rank-r correction that are nearest to W *together*,

    minimize ‖W − Q − s·B·A‖        W (out × in), B (out × r), A (r × in), s = lora_alpha / r

by doing one with the other held fixed, in turn, with L = s·B·A and from L_0 = 0:

    Q_t = q(W − L_{t−1})     quantize what the low rank does not carry
    L_t = SVD_r(W − Q_t)     and carry what the quantization lost

The second step is optimal for its Q (Eckart and Young). The first, as published, is not optimal for
its L: taking each block's largest magnitude for its absmax minimizes no error, so the error may
rise from one iterate to the next. All are recorded then and the best is kept. That, with
``svd="exact"``, is what PEFT does.

A quantizer that ``searches`` makes the first step a descent too (``absmax.py``): from the absmax it
had, every block goes to a pair of absmax and codes that leaves less of the target. So each step can
only lower the error,

    ‖W − Q_{t+1} − L_{t+1}‖  ≤  ‖W − Q_{t+1} − L_t‖  ≤  ‖W − Q_t − L_t‖

and what breaks this all the same, like the rounding of absmax that are quantized themselves, is no
iterate: it is thrown away, and the last one before it is the best.

The steps are short, so what is quantized lies beyond W − L_t (``extrapolation.py``). Any target may
be, since the SVD that follows fits what came of it; where the error rises for that, the step is
taken again from the best, without the extra length.

``start="weight"`` begins with L_0 = SVD_r(W) instead, as PiSSA does (arXiv 2404.02948): the largest
directions of W are never quantized, and the blocks have less to hold. Of the 16 weights of the demo
model at rank 8 it leaves 0.76 of what LoftQ as published leaves after five iterations with NF4, and
0.59 with NF2, whereas the start from zero leaves 0.87 and 0.63.

The error is always that of what will be loaded: Q is what the stored codes dequantize to, rounded
to the dtype of the runtime, and s·B·A is formed from the float32 adapter that is returned. Unless
the SVD is exact it is a few products with what the last one found (``lowrank.py``).
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loftq_cli.core.blockwise import check_finite, check_weight
from loftq_cli.core.extrapolation import Extrapolation
from loftq_cli.core.lowrank import LowRank, check_rank, rounded_to, split, truncated_svd
from loftq_cli.core.parallel import one_thread_each
from loftq_cli.core.residual import Residual, sum_of_squares
from loftq_cli.core.sketches import takes_exact
from loftq_cli.core.steps import Factors, Quantizer
from loftq_cli.errors import InvalidSetting, NonFiniteWeight

# μ and ω, for published steps and where a step too long is taken back. They overshoot where the
# rank is most of the matrix's, and are left out from half of it on.
MOMENTUM, MONOTONE_MOMENTUM = (0.6, 0.0), (0.8, 0.7)
# Where L begins.
STARTS = ("zero", "weight")
# Unless a number is asked for, the iterations end with the first that takes less than this off the
# error; and after so many.
ENOUGH, MOST_ITERATIONS = 5e-3, 50
# What another pass of the SVD must take off the square of the error: while there are more steps to
# come, and at the end.
_UNDERWAY, _AT_THE_END = 5e-3, 2e-4
# Below this share of the residual's square, what the low rank leaves of it is lost in rounding.
_CANCELS = 0.1
# After a gain below this, the next iterate may be the last.
_NEARLY_ENOUGH = 1.5 * ENOUGH


@dataclass(frozen=True)
class LoftqResult:
    """One layer's start. Errors are relative: ‖W − Q − s·B·A‖ / ‖W‖, Frobenius."""

    quantized: Any  # the stored form, as its quantizer makes it
    lora_A: Tensor  # float32 (r, in), of values that the dtype of the file has
    lora_B: Tensor  # float32 (out, r)
    error: float  # of the three above, measured on them
    quantized_only_error: float  # ‖W − q(W)‖ / ‖W‖: what plain quantization leaves
    # ‖W − Q‖ / ‖W‖: what this Q leaves, which was chosen to go with the adapter, without it
    backbone_error: float
    best_iteration: int  # counted from 1; 0 when there was none
    errors: list[float] = field(default_factory=list)  # of every iterate
    # After a calibration: the same of the outputs, relative to ``output_norm``, the root mean
    # square of the layer's output vectors.
    output_error: float | None = None
    quantized_only_output_error: float | None = None
    output_norm: float | None = None


@torch.no_grad()
def initialize(
    W: Tensor,
    quantizer: Quantizer,
    rank: int,
    *,
    scaling: float = 1.0,
    iterations: int | None = None,
    start: str = "zero",
    svd: str = "auto",
    adapter_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> LoftqResult:
    """Run the alternation on the weight ``W`` (out × in) and return its best iterate.

    ``scaling`` is the factor that PEFT will multiply B·A with. Unless there are to be so many
    ``iterations``, they go on while they are worth their time. With none the weight is quantized
    and the adapter starts as PEFT's LoRA does: B = 0, A random. ``start`` is the L that is there
    before the first: "zero" or, with "weight", W's own SVD. The adapter is rounded to
    ``adapter_dtype`` at the end, before its error is measured.

    Everything happens on ``W``'s device.

    The same arguments give the same bits on the same machine, however many threads there are, with
    two exceptions: the last bits of an exact SVD depend on LAPACK's threads, and the offset of
    double quantization on torch's, as it does in bitsandbytes.
    """
    if iterations is not None and iterations < 0:
        raise InvalidSetting(f"{iterations} iterations are not possible")
    if start not in STARTS:
        raise InvalidSetting(f"start {start!r} is not one of {', '.join(STARTS)}")
    W = checked(W, scaling)
    check_rank(rank, W.shape[0], W.shape[1])
    with nullcontext() if svd == "exact" else one_thread_each():
        alternation = _Alternation(W, quantizer, rank, svd, seed)
        return alternation.run(scaling, iterations, start, adapter_dtype)


def checked(W: Tensor, scaling: float) -> Tensor:
    """``W``, contiguous, if there can be a start of this weight with this scaling."""
    check_weight(W)
    if not scaling > 0:
        raise InvalidSetting(f"a LoRA scaling of {scaling} is not possible: it must be above 0")
    check_finite(W)
    return W.detach().contiguous()  # a transposed view would be gathered anew in every pass


@dataclass(frozen=True)
class _Iterate:
    """A quantized weight, and the low rank that goes with it."""

    quantized: Any
    low_rank: LowRank


class _Alternation:
    """The two steps for one weight."""

    def __init__(self, W: Tensor, quantizer: Quantizer, rank: int, svd: str, seed: int) -> None:
        self.W = W
        self.quantizer = quantizer
        self.rank = rank
        self.svd = svd
        self.generator = torch.Generator().manual_seed(seed)
        # A randomized SVD can do with rounded products.
        self.rounded = not takes_exact((W.shape[0], W.shape[1]), rank, svd)
        self.steps = quantizer.steps(W, rounded=self.rounded)
        self.norm = math.sqrt(sum_of_squares(W)) or 1.0  # an all-zero weight has errors of zero
        self.extrapolation: Extrapolation | None = None

    def run(
        self, scaling: float, iterations: int | None, start: str, adapter_dtype: torch.dtype
    ) -> LoftqResult:
        if iterations not in (0, 1) and self.svd != "exact" and 2 * self.rank <= min(self.W.shape):
            usual = MONOTONE_MOMENTUM if self.quantizer.searches else MOMENTUM
            self.extrapolation = Extrapolation(self.W, *usual)
        quantized, residual = self._plainly()
        if not math.isfinite(residual.energy):
            raise NonFiniteWeight("the quantized values overflow the dtype of the runtime")
        plain_error = self._relative(residual.energy)
        carried: LowRank | None = None
        if self.quantizer.searches or start == "weight":
            del quantized, residual  # the next ones take as much memory
            quantized, residual, carried = self._first(start)
        errors: list[float] = []
        if iterations != 0:
            best, errors = self._alternate(quantized, residual, carried, iterations)
        elif carried is not None:
            best = _Iterate(quantized, carried)
        else:
            A, B = plain_adapter((self.W.shape[0], self.W.shape[1]), self.rank, self.generator)
            A, B = rounded_to(adapter_dtype, A.to(self.W.device), B.to(self.W.device))
            error = self._relative(residual.energy)
            return LoftqResult(quantized, A, B, error, plain_error, error, 0)
        A, B = split(best.low_rank, scaling)
        randomize_unused(A, B, best.low_rank.S, self.generator)
        A, B = rounded_to(adapter_dtype, A, B)
        error = self._relative(self.steps.remainder(best.quantized, Factors(scaling * B, A)))
        best_iteration = 1 + errors.index(min(errors)) if errors else 0
        if errors:
            errors[best_iteration - 1] = error
        alone = self._relative(self.steps.remainder(best.quantized, Factors(B[:, :0], A[:0])))
        return LoftqResult(best.quantized, A, B, error, plain_error, alone, best_iteration, errors)

    def _plainly(self) -> tuple[Any, Residual]:
        """q(W) without a search, and W − q(W)."""
        if not self.quantizer.searches:
            return self.steps.quantize()
        return self.quantizer.plain().steps(self.W, rounded=self.rounded).quantize()

    def _first(self, start: str) -> tuple[Any, Residual, LowRank | None]:
        """Q_1, W − Q_1 and L_0.

        What is left of W, or the absmax that are found for it, may outgrow the runtime's dtype
        where W itself does not. Then L_0 is zero after all, or the absmax are not searched for.
        """
        if start == "weight":
            low_rank = self._decompose(Residual.of(self.W.float()))
            quantized, residual = self._quantize(low_rank, None, beyond=False)
            if math.isfinite(residual.energy):
                return quantized, residual, low_rank
        quantized, residual = self.steps.quantize()
        if math.isfinite(residual.energy):
            return quantized, residual, None
        return *self._plainly(), None

    def _alternate(
        self,
        quantized: Any,
        residual: Residual,
        carried: LowRank | None,
        iterations: int | None,
    ) -> tuple[_Iterate, list[float]]:
        """The best iterate and the errors of all, from Q_1, W − Q_1 and L_0 on."""
        monotone = self.quantizer.searches
        most = MOST_ITERATIONS if iterations is None else iterations
        best: _Iterate | None = None
        errors: list[float] = []
        lowest, gain = math.inf, math.inf
        beyond, extrapolated = self.extrapolation is not None, False
        while math.isfinite(residual.energy):  # else a target outgrew the runtime's dtype
            near = len(errors) + 1 == most or (iterations is None and gain < _NEARLY_ENOUGH)
            low_rank = self._decompose(residual, carried, _AT_THE_END if near else _UNDERWAY)
            latest = _Iterate(quantized, low_rank)
            error = self._error(latest, residual)
            gain = 1 - error / lowest if lowest else 0.0
            better = best is None or lowest - error > (_noise(lowest) if monotone else 0.0)
            if better:
                best, lowest = latest, error
            if better or not monotone:
                errors.append(error)
                if len(errors) == most or (iterations is None and gain < ENOUGH):
                    break
                beyond = beyond and better  # else the steps became too long
                extrapolated = beyond
            elif best is not None and extrapolated:
                latest, extrapolated = best, False  # it was too long: it is taken again from there
            else:
                break  # the descent has come to its end
            carried = latest.low_rank
            quantized, residual = self._quantize(carried, latest.quantized, beyond=extrapolated)
        assert best is not None
        return best, errors

    def _quantize(self, low_rank: LowRank, like: Any, *, beyond: bool) -> tuple[Any, Residual]:
        """The step after ``low_rank``, to W − L or ``beyond``."""
        carried = Factors(low_rank.U, low_rank.S[:, None] * low_rank.Vh, low_rank.subspace)
        if self.extrapolation is not None:
            self.extrapolation.restarts = not beyond
        return self.steps.quantize(carried, like, self.extrapolation)

    def _error(self, iterate: _Iterate, residual: Residual) -> float:
        """Known, as L is a projection of the residual; measured where a difference says little."""
        low_rank = iterate.low_rank
        rest = residual.energy - low_rank.energy
        if rest < _CANCELS * residual.energy:
            factors = Factors(low_rank.U * low_rank.S, low_rank.Vh)
            rest = self.steps.remainder(iterate.quantized, factors)
        return self._relative(rest)

    def _relative(self, energy: float) -> float:
        return math.sqrt(energy) / self.norm

    def _decompose(
        self, residual: Residual, like: LowRank | None = None, tolerance: float = _AT_THE_END
    ) -> LowRank:
        return truncated_svd(
            residual,
            self.rank,
            method=self.svd,
            start=like.subspace if like else None,
            tolerance=tolerance,
            generator=self.generator,
        )


@torch.no_grad()
def start_of_residual(
    R: Tensor,
    rank: int,
    *,
    scaling: float,
    svd: str = "auto",
    adapter_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, float]:
    """The adapter of this rank that leaves least of R = W − Q (out × in), whose codes are chosen.

    Returns:
        A (rank, in) and B (out, rank) in float32, rounded to ``adapter_dtype``, and what they
        leave: ‖R − scaling · B·A‖².
    """
    generator = torch.Generator().manual_seed(seed)
    with nullcontext() if svd == "exact" else one_thread_each():
        low_rank = truncated_svd(
            Residual.of(R), rank, method=svd, tolerance=_AT_THE_END, generator=generator
        )
        A, B = split(low_rank, scaling)
        randomize_unused(A, B, low_rank.S, generator)
        A, B = rounded_to(adapter_dtype, A, B)
        return A, B, sum_of_squares(R.addmm(B, A, alpha=-scaling))


def plain_adapter(
    shape: tuple[int, int], rank: int, seed: int | torch.Generator = 0
) -> tuple[Tensor, Tensor]:
    """(A, B) as PEFT starts a LoRA adapter: A Kaiming-uniform with a = √5, B zero. On the CPU."""
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    bound = 1 / math.sqrt(shape[1])
    A = torch.empty(rank, shape[1]).uniform_(-bound, bound, generator=generator)
    return A, torch.zeros(shape[0], rank)


def _noise(error: float) -> float:
    """By how much an error must fall to have fallen, whatever float32 rounded on the way."""
    return max(1e-5 * error, 1e-6)


def randomize_unused(A: Tensor, B: Tensor, S: Tensor, generator: torch.Generator) -> None:
    """Give directions that carry nothing a random row of A, so that they can be trained.

    Where a singular value is zero both halves of the balanced split are, and no gradient would
    ever reach either. B is zero there, so the product is the same to rounding.
    """
    unused = S.le(torch.finfo(torch.float32).eps * S[0])
    if unused.any():
        A[unused] = plain_adapter((0, A.shape[1]), A.shape[0], generator)[0].to(A.device)[unused]
        B[:, unused] = 0.0
