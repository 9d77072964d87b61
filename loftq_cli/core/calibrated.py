"""A start that keeps what a layer puts out, not what it holds: LoftQ with the inputs' moments.

With G = E[x·xᵀ] over some text that runs through the model, the adapter and the codes minimize

    E‖(W − Q − s·B·A)·x‖² = tr(R·G·Rᵀ)        R = W − Q − s·B·A

- ``qera`` (arXiv 2410.06040, "exact"): Q is quantized without it (with searched absmax), and B·A
  the best there is for that. ``qera-diagonal`` takes the inputs for uncorrelated.
- ``calibrated`` chooses the codes too. From L = the best low rank of W itself it alternates:

      Q ← W − L rounded as GPTQ does (the first time) or improved code by code
      L ← the best low rank of W − Q

  Neither step raises the error, in the damped moments that both are taken with.

That is so for all layers at once, from the original model alone. Calibrated in sequence, a layer
knows what the layers before it have become: with x what it is given in the original model and x̃
what it is given in the quantized one, the codes and the adapter Ŵ = Q + s·B·A minimize

    E‖W·x − Ŵ·x̃‖² + λ·‖W − Ŵ‖²

and make good, as far as they can, what the layers before lost. (Of E‖W·x − Ŵ·x̃‖² are GPTAQ,
arXiv 2504.02692, and Qronos, arXiv 2505.11695, which have codes alone.) λ is the damping. With
H = E[x̃·x̃ᵀ] and D = E[(x − x̃)·x̃ᵀ] this is, but for a constant,

    tr((T − Ŵ)·(H + λ)·(T − Ŵ)ᵀ)        T = W + W·D·(H + λ)⁻¹

so the alternation is the same, with T for W and H for G. Where nothing comes before, x̃ = x, T is W.
D holds what E[x·x̃ᵀ] − H does without the loss of digits where x̃ is near x; and the damping draws
T to W, not to zero, in directions that few tokens reach.

A layer whose output is added to the residual stream can also make good what the stream itself has
lost until then. With h what the output is added to, and h̃ what that is in the quantized model,

    E‖h + W·x − h̃ − Ŵ·x̃‖² + λ·‖W − Ŵ‖²      T = W + (W·D + S)·(H + λ)⁻¹,  S = E[(h − h̃)·x̃ᵀ]

is minimized instead. So the layer's own output W·x may then be met less well than without; which
iterate is better is seen by the distance from T, in that metric.

The file is the same, and so is what runs it: only other codes, absmax and adapter. All errors are
those of what will be loaded: the stored codes, dequantized in the dtype of the runtime, and
the float32 adapter; those of the outputs by the moments as they were given, undamped, and against
the original's W·x, also where a layer makes good what the stream has lost.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from loftq_cli.core.blockwise import QuantizedBlockwise, quantize_blockwise, restore_absmax
from loftq_cli.core.gptq import Grid, Rounding, descend, gptq
from loftq_cli.core.input_moments import (
    DampedMoments,
    Drift,
    check_moments,
    output_energy,
    principal_root,
    weighted_low_rank,
)
from loftq_cli.core.loftq import LoftqResult, checked, randomize_unused
from loftq_cli.core.lowrank import LowRank, check_rank, rounded_to, split
from loftq_cli.core.parallel import one_thread_each
from loftq_cli.core.quantizers import BlocksQuantizer, Blockwise
from loftq_cli.core.residual import rows_times, sum_of_squares
from loftq_cli.errors import InvalidSetting, NonFiniteWeight

Method = Literal["calibrated", "qera", "qera-diagonal"]
# Unless a number is asked for, the iterations end with the first that takes less than this off the
# error; and after so many.
_ENOUGH, _MOST_ITERATIONS = 2e-3, 10
# Times through all codes before the first low rank of what they leave, and before those after it.
# Against two each time, trained models' layers (rank 8) end 0.2 % lower with a seventh less work,
# and a random one of 4096×4096 (rank 64) 0.4 % higher with a fifth less.
_FIRST_SWEEPS, _SWEEPS = 4, 1
# And before absmax are rounded all together.
_SWEEPS_OF_ABSMAX = 2


@torch.no_grad()
def initialize_calibrated(
    W: Tensor,
    input_moments: Tensor,
    quantizer: BlocksQuantizer,
    rank: int,
    *,
    drift: Drift | None = None,
    method: Method = "calibrated",
    scaling: float = 1.0,
    iterations: int | None = None,
    adapter_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> LoftqResult:
    """The best start of the weight ``W`` (out × in) for inputs with these moments (in × in).

    ``input_moments`` are E[x·xᵀ], symmetric; where all are zero, errors of weights are what counts.
    With a ``drift``, which only ``calibrated`` takes, they are those of the inputs x̃ that the
    quantized layers before it leave, and the outputs are held against the original's, W·x; with one
    of the residual ``stream`` that they are added to, it is the stream that is kept.
    Without a ``rank`` only codes and absmax are chosen, and the adapter is empty. ``scaling`` is
    the factor that PEFT will multiply B·A with, and the adapter is rounded to ``adapter_dtype``
    before its errors are measured. ``iterations`` are those of ``calibrated``, until they stop
    paying unless given; the other methods have one. ``errors`` of the result are the relative
    output errors of every iteration, √E‖W·x − Ŵ·x̃‖² / √E‖W·x‖², stream or not. Everything happens
    on ``W``'s device, and the same arguments give the same bits on the same machine with as many
    threads.
    """
    if method not in get_args(Method):
        raise InvalidSetting(f"method {method!r} is not one of {', '.join(get_args(Method))}")
    if not isinstance(quantizer, BlocksQuantizer):
        raise InvalidSetting(
            "calibrated starts are for codes in blocks, not for bitsandbytes' int8"
        )
    if iterations is not None and iterations < 1:
        raise InvalidSetting(f"{iterations} iterations are not possible here: at least 1 is needed")
    if drift is not None and method != "calibrated":
        raise InvalidSetting(f"method {method} is for the inputs of the original model")
    W = checked(W, scaling)
    if rank:
        check_rank(rank, W.shape[0], W.shape[1])
    check_moments(input_moments, W.shape, drift)
    generator = torch.Generator().manual_seed(seed)
    input_moments = input_moments.to(W.device, torch.float32)
    if drift is not None:
        drift = drift.to(W.device)
    problem = _Problem(W, input_moments, drift, quantizer, rank, generator)
    with one_thread_each():
        if method == "calibrated":
            found, errors = _alternate(problem, iterations)
        else:
            found = _low_rank_only(problem, diagonal=method == "qera-diagonal")
            errors = [found.lost]
        return _result(problem, found, errors, scaling, adapter_dtype)


class _Problem:
    """A weight in units near its largest value, so that no square overflows."""

    def __init__(
        self,
        source: Tensor,  # W as it was given
        input_moments: Tensor,
        drift: Drift | None,
        quantizer: BlocksQuantizer,
        rank: int,
        generator: torch.Generator,
    ) -> None:
        self.source, self.quantizer, self.rank, self.generator = source, quantizer, rank, generator
        peak = float(source.abs().max())
        # A power of two: W = source · unit, in float32.
        self.unit = 2.0 ** -max(min(round(math.log2(peak)), 126), -126) if peak else 1.0
        self.W = W = source.float() * self.unit
        # W·D and E‖W·(x − x̃)‖²; None and 0 where the inputs are the original's.
        self.drifted = None if drift is None else rows_times(W, drift.cross)
        self.drift_energy = 0.0 if drift is None else drift.output_energy * self.unit**2
        self.stream = None if drift is None else drift.stream
        # As they were given; the identity where they are zero.
        known = bool(input_moments.any())
        self.moments = input_moments if known else torch.eye(W.shape[1], device=W.device)
        # √E‖W·x‖², which errors are relative to; 1 if that is zero.
        norm = math.sqrt(self._energy(W))
        self.norm = norm or 1.0
        # The same in the units of the source.
        self.output_norm = (norm if known else math.sqrt(self.drift_energy)) / self.unit
        self.dtype = quantizer.dtype or source.dtype
        size, largest = quantizer.block_size(W.shape[1]), quantizer.largest(self.dtype)
        self.grid = Grid.of(quantizer.levels, size, W, largest, self.unit)

    def target(self, inputs: DampedMoments) -> Tensor:
        """T (out × in), where nothing drifts W itself."""
        if self.drifted is None:
            return self.W
        moved = self.drifted * inputs.unit
        if self.stream is not None:
            moved.add_(self.stream, alpha=self.unit * inputs.unit)
        return inputs.times_inverse(moved).add_(self.W)

    def residual(self, quantized: Any) -> Tensor:
        """W − Q (out × in), in the units of this problem."""
        return self.W - self.quantizer.dequantize(quantized).float() * self.unit

    def output_error(self, R: Tensor) -> float:
        """√E‖W·x − Ŵ·x̃‖² / √E‖W·x‖² for R = W − Ŵ."""
        return math.sqrt(self._energy(R)) / self.norm

    def _energy(self, R: Tensor) -> float:
        return output_energy(R, self.moments, self.drifted, self.drift_energy)

    def stored(self, rounding: Rounding, like: QuantizedBlockwise | None) -> Any:
        """What is written to the file; with the absmax of ``like``, if that is given."""
        if like is not None:
            assert isinstance(self.quantizer, Blockwise)
            return self.quantizer.recoded(like, rounding.indices)
        return self.quantizer.stored(rounding.indices, rounding.absmax / self.unit, self.dtype)


@dataclass(frozen=True)
class _Found:
    """A start, and what tells which is better: as a rule the relative output error."""

    quantized: Any  # the stored form, as its quantizer makes it
    low_rank: LowRank  # in the units of the problem
    lost: float
    iteration: int = 1


def _low_rank_only(problem: _Problem, *, diagonal: bool) -> _Found:
    quantized, _ = problem.quantizer.steps(problem.source).quantize()
    R = problem.residual(quantized)
    root = problem.moments.diagonal().sqrt() if diagonal else principal_root(problem.moments)
    low_rank = weighted_low_rank(R, root, problem.rank, problem.generator, tolerance=1e-5)
    return _Found(quantized, low_rank, problem.output_error(R - low_rank.dense()))


def _alternate(problem: _Problem, iterations: int | None) -> tuple[_Found, list[float]]:
    """The best iterate and the errors of all."""
    grid, rank, generator = problem.grid, problem.rank, problem.generator
    inputs = DampedMoments.of(problem.moments)
    T = problem.target(inputs)
    low_rank = weighted_low_rank(T, inputs.root, rank, generator)
    rounding, kept = _first_rounding(problem, inputs, T - low_rank.dense())
    best: _Found | None = None
    errors: list[float] = []
    most = _MOST_ITERATIONS if iterations is None else iterations
    for iteration in range(1, most + 1):
        sweeps = _FIRST_SWEEPS if iteration == 1 else _SWEEPS
        rounding = descend(
            T - low_rank.dense(), inputs.moments, rounding, grid, sweeps=sweeps, free=kept is None
        )
        quantized = problem.stored(rounding, kept)
        R = problem.residual(quantized)
        rest = R if T is problem.W else R + (T - problem.W)
        low_rank = weighted_low_rank(rest, inputs.root, rank, generator, start=low_rank.subspace)
        error = lost = problem.output_error(R - low_rank.dense())
        if problem.stream is not None:
            # What no weight could make good is no part of it. Much of what a stream has lost may be
            # of that kind, and would hide what an iteration gains.
            lost = math.sqrt(output_energy(rest - low_rank.dense(), inputs.moments))
        before = best.lost if best else math.inf
        if best is not None and lost > before:
            break  # nothing is left to gain but in the damped moments
        errors.append(error)
        best = _Found(quantized, low_rank, lost, iteration)
        if iterations is None and lost >= (1 - _ENOUGH) * before:
            break
    assert best is not None
    return best, errors


def _first_rounding(
    problem: _Problem, inputs: DampedMoments, T: Tensor
) -> tuple[Rounding, QuantizedBlockwise | None]:
    """``T`` rounded by GPTQ; and the absmax as stored, if they are to stay."""
    grid, quantizer = problem.grid, problem.quantizer
    if grid.aligned:
        rounding = gptq(T, inputs.root, grid)
    else:
        assert isinstance(quantizer, Blockwise)
        fmt = replace(quantizer.format, double_quant=False)
        by_block = quantize_blockwise(T, fmt, search=quantizer.search)
        rounding = gptq(T, inputs.root, grid, by_block.absmax.clamp_(-grid.largest, grid.largest))
    if not quantizer.rounds_together:
        return rounding, None
    # They are as good as they will be before they are rounded themselves.
    rounding = descend(T, inputs.moments, rounding, grid, sweeps=_SWEEPS_OF_ABSMAX, free=True)
    kept = problem.stored(rounding, None)
    return gptq(T, inputs.root, grid, restore_absmax(kept) * problem.unit), kept


def _result(
    problem: _Problem,
    found: _Found,
    errors: list[float],
    scaling: float,
    adapter_dtype: torch.dtype,
) -> LoftqResult:
    """Measured on what will be loaded."""
    low_rank = replace(found.low_rank, S=found.low_rank.S / problem.unit)
    A, B = split(low_rank, scaling)
    if problem.rank:
        randomize_unused(A, B, low_rank.S, problem.generator)
        A, B = rounded_to(adapter_dtype, A, B)
    norm = math.sqrt(sum_of_squares(problem.W)) or 1.0
    plain, _ = problem.quantizer.plain().steps(problem.source).quantize()
    R = problem.residual(plain)
    if not R.isfinite().all():
        raise NonFiniteWeight("the quantized values overflow the dtype of the runtime")
    plain_error, plain_output_error = math.sqrt(sum_of_squares(R)) / norm, problem.output_error(R)
    R = problem.residual(found.quantized)
    backbone_error = math.sqrt(sum_of_squares(R)) / norm
    R = R.addmm_(B * problem.unit, A, alpha=-scaling)
    errors[found.iteration - 1] = problem.output_error(R)
    return LoftqResult(
        found.quantized,
        A,
        B,
        math.sqrt(sum_of_squares(R)) / norm,
        plain_error,
        backbone_error,
        found.iteration,
        errors,
        output_error=errors[found.iteration - 1],
        quantized_only_output_error=plain_output_error,
        output_norm=problem.output_norm,
    )
