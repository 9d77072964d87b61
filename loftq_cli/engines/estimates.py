"""What a run will need, before it starts: memory and time, from the plan alone.

Memory is the sum of what is held at once for the largest layer, beside the libraries themselves
and the adapters of one output file. In bytes a weight of that layer:

    2 × dtype   the weight that is worked on, and the next one, which is read meanwhile; one more
                while a transposed weight is turned
    2 or 4      the residual, in the dtype of the sketches
    4           where the steps aim at, unless there is one, or an exact SVD
    20          instead of that in 8 bits, which are worked on whole
    3 × ⁹⁄₁₆    codes: this iterate's, the best one's, and a finished layer's that wait for the disk
    3 × 1       the same in 8 bits, and integers of any bits until they are packed
    32          instead of residual and codes with the exact SVD: residual, U, V, LAPACK's workspace

and besides, for every direction of a sketch, ten vectors as long as a column and a row.
Without the reading ahead one dtype less is held.

Calibrated starts hold the model too, or as much of it as may be, and work in float32: copies of the
layer's weight, and matrices of its moments' size. In sequence these are more, and beside them lie a
block's quantized weights and two hidden states for every token, on the disk where there is no room.

With `--max-memory` reading ahead is given up where it does not fit; the files are the same, and the
run takes longer. Several workers take that each, beside the process that gives them their tasks;
all together they have to fit into this machine where no other limit is given, and so does what
`--distill-steps` takes on a CPU.

Measured on two cores (VmHWM, MB) against these estimates, with the reading ahead and without:

    the demo, rank 16                                   536  610
    GPT-2 (124M, Conv1D, bfloat16), rank 16             640  674
    one block of a 7B Llama, rank 64, float32 sketches 1242 1315    1132 1225

Time is a rate that was measured on two cores (README, "How fast"); other machines differ by their
own factor.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

from loftq_cli.core.sketches import PIECE, sketch_width, takes_exact
from loftq_cli.engines.plan import Plan, PlannedLayer, block_number
from loftq_cli.engines.settings import Settings
from loftq_cli.errors import DoesNotFit
from loftq_cli.formats import DTYPE_BITS, MOST_RANKS
from loftq_cli.models.distillation import BATCH, EVALUATED, WINDOW_LENGTH
from loftq_cli.models.evaluation import KEPT_BYTES
from loftq_cli.models.streams import FOR_HIDDEN_STATES
from loftq_cli.report import units

# Python, torch, transformers and the compiled kernels, resident after a run on a tiny model:
# 510 MB were measured there, and more is wanted where the kernels are compiled first.
LIBRARY_BYTES = 560_000_000
# Tensors that are copied, a few pieces of 8 MiB of each waiting for the disk.
_COPYING_BYTES = 40_000_000

# Float32 vectors (a row and a column of the layer each) for every direction of the sketch: factors
# of this step, the one before and the best, and the products that the SVD is made of.
_VECTORS = 10

# Seconds a weight and iteration on two cores: a part for every weight, and one that grows with
# the rank. Exact SVDs grow with the layer's smaller side instead.
_SECONDS_A_WEIGHT = 4.0e-9
_SECONDS_A_WEIGHT_AND_RANK = 2.0e-11
_SECONDS_EXACT = 2.0e-10
# With absmax searched for: once for every weight, from nothing; and instead of the first of those
# two in every iteration.
_SECONDS_FIRST_SEARCH = 4.0e-8
_SECONDS_SEARCHED = 4.1e-9
# And a layer and iteration, however small the layer is. Measured against told, in seconds: a weight
# of 4096×4096 at rank 64 1.58 and 1.61, with one iteration 0.78 and 0.77; one of 2048×2048 0.51 and
# 0.43; one of 768×2304 at rank 16 0.17 and 0.19; two cores with AVX2.
_SECONDS_AN_ITERATION = 4.0e-3
# Steps until another hardly pays, as a rule.
_ITERATIONS = 10
# Calibrated, seconds a weight, for the loops over its codes, and a weight and input of its layer,
# for the products; and in float32, what is held: copies of the weight, and matrices as large as the
# moments.
_SECONDS_CALIBRATED = 4.5e-7
_SECONDS_CALIBRATED_AND_INPUT = 1.6e-10
_CALIBRATED, _MOMENTS = 8, 8
_SEQUENTIAL, _DRIFT = 5, 3  # what is added to those
# And the model's own passes over the text, seconds a weight and token.
_SECONDS_A_PASS = 3.0e-11
# While adapters are distilled: tokens in a step, each of which runs the model four times (teacher,
# student, backward). Floats that are held: of A and B, their gradients, two moments and the product
# of a step; for each token and entry of the vocabulary, and for each input or output of a layer.
# And the original's logits of what is evaluated. The demo at rank 16 took 1532 MB, 180 more than
# all these, which are taken for the same at any size.
_STEP = BATCH * WINDOW_LENGTH
_RUNS, _FACTORS, _LOGITS, _PASSED = 4, 5, 10, 4
_BEYOND = 250_000_000
# Bytes a weight while its loss is measured: two float32 of the residual, and codes.
_MEASURING = 9


class Machine(NamedTuple):
    """What of the machine decides about memory."""

    product_bytes: int = 4  # of a number in the sketches; 2 where bfloat16 is multiplied natively
    threads: int = 2  # of a worker
    memory_bytes: int | None = None  # that there is at all
    distills: bool = False  # in this memory, not in that of a GPU


@dataclass(frozen=True)
class MemoryPlan:
    """Whether the next layer is read while one is worked on, the peak in bytes, and why.

    ``task_bytes`` is that of a process which only makes files or layers.
    """

    ahead: bool
    peak_bytes: int
    reason: str
    task_bytes: int

    @property
    def name(self) -> str:
        return "read-ahead" if self.ahead else "one-layer"


def plan_memory(plan: Plan, limit: int | None, machine: Machine, workers: int = 1) -> MemoryPlan:
    """Reading ahead, unless only doing without is within ``limit`` bytes (None: no limit).

    Raises:
        DoesNotFit: neither is.
    """
    make = _plan_of_workers if workers > 1 else _plan_of_one
    memory = make(plan, limit, machine, workers)
    if plan.settings.distill_steps is None:
        return memory
    return _then_distilled(memory, plan, limit, machine)


def _then_distilled(
    memory: MemoryPlan, plan: Plan, limit: int | None, machine: Machine
) -> MemoryPlan:
    """The same with what adapters take that are trained when all layers are there."""
    needed = LIBRARY_BYTES + distilling_bytes(plan)
    most = machine.memory_bytes if limit is None and machine.distills else limit
    if most is not None and needed > most:
        given, more = f"--max-memory {_megabytes(most)}", f"--max-memory {_megabytes(needed)}"
        if limit is None:
            given = f"the {units.size(most)} of memory of this machine"
            more = "a machine or a GPU with more memory"
        raise DoesNotFit(
            f"{given} is too little for --distill-steps",
            cause=f"it takes about {units.size(needed)}: the model and its quantized weights, and "
            "what a step computes",
            hint=f"{more}, or leave --distill-steps out",
        )
    return replace(
        memory,
        peak_bytes=max(memory.peak_bytes, needed),
        reason=f"{memory.reason}; in the end about {_megabytes(needed)} to distill the adapters",
    )


def _plan_of_one(plan: Plan, limit: int | None, machine: Machine, workers: int) -> MemoryPlan:
    """What this process takes, which makes all files."""
    model = _calibration_bytes(plan, limit)
    peak = 0
    for ahead, does in (
        (True, "the next layer is read while one is worked on"),
        (False, "one layer is held at a time"),
    ):
        alone = memory_bytes(plan, machine, ahead=ahead)
        peak = model + alone
        if limit is None:
            return MemoryPlan(ahead, peak, f"{does}; no --max-memory", alone)
        if peak <= limit:
            needs = f"about {_megabytes(peak)} of the {_megabytes(limit)} of --max-memory"
            return MemoryPlan(ahead, peak, f"{does}: {needs}", alone)
    assert limit is not None
    needed, largest = max(
        ((_layer_bytes(plan, each, machine, ahead=False), each) for each in plan.layers),
        key=lambda found: found[0],
    )
    out_features, in_features = largest.shape
    raise DoesNotFit(
        f"--max-memory {_megabytes(limit)} is too little for this model",
        cause=f"the largest layer, {largest.layer.module} ({out_features}×{in_features}), takes "
        f"{_megabytes(needed)} at the least, beside {_megabytes(peak - needed)} "
        "for libraries and adapters",
        hint=f"--max-memory {_megabytes(peak)} is the least that works",
    )


def _plan_of_workers(plan: Plan, limit: int | None, machine: Machine, workers: int) -> MemoryPlan:
    """The same for several processes beside this one."""
    most, whose = (
        (machine.memory_bytes, "this machine") if limit is None else (limit, "--max-memory")
    )
    one, this = 0, LIBRARY_BYTES + _calibration_bytes(plan, most)
    for ahead in (True, False):
        one = memory_bytes(plan, machine, ahead=ahead)
        peak = this + workers * one
        if most is None or peak <= most:
            reason = f"{workers} workers, each with about {_megabytes(one)}"
            if most is not None:
                reason += f", in the {_megabytes(most)} of {whose}"
            return MemoryPlan(ahead, peak, reason, one)
    assert most is not None
    fit = max(1, (most - this) // one)
    raise DoesNotFit(
        f"{workers} workers do not fit into the {_megabytes(most)} of {whose}",
        cause=f"each takes about {_megabytes(one)}, beside {_megabytes(this)} for the process that "
        "gives them their tasks",
        hint=f"--workers {fit}",
    )


def _megabytes(count: int) -> str:
    """As --max-memory takes it, rounded up."""
    return f"{-(-count // 10**6)}MB"


def memory_bytes(plan: Plan, machine: Machine, *, ahead: bool) -> int:
    """Peak resident memory of a run on the CPU."""
    layer = max(
        (_layer_bytes(plan, planned, machine, ahead=ahead) for planned in plan.layers), default=0
    )
    adapters = max(
        sum(tensor.nbytes for tensor in plan.adapter_tensors(task.layers)) for task in plan.tasks
    )
    dtype = plan.settings.adapter_dtype
    stack = max((sum(t.nbytes for t in each.planned("", dtype)) for each in plan.stacks), default=0)
    return LIBRARY_BYTES + _COPYING_BYTES + layer + max(adapters, stack)


def distilling_bytes(plan: Plan) -> int:
    """What `--distill-steps` holds: the model and its quantized weights, and a step's numbers."""
    layers, left = sum(each.layer.parameters for each in plan.layers), plan.left
    others = sum(math.prod(each.shape) for each in left)
    # The head is the largest matrix with a row for every token; probabilities of both models.
    vocabulary = max((each.shape[0] for each in left if len(each.shape) == 2), default=0)
    passed = sum(_PASSED * sum(each.shape) for each in plan.layers)
    factors = _FACTORS * plan.trainable_parameters
    kept = min(4 * EVALUATED * WINDOW_LENGTH * vocabulary, KEPT_BYTES)
    step = _STEP * (_LOGITS * vocabulary + passed)
    # Where nobody said: float32 on a CPU, and at the most that on a GPU.
    weight = 2 if plan.settings.dtype == "bfloat16" else 4
    return _BEYOND + kept + weight * (2 * layers + others) + 4 * (factors + step)


def _calibration_bytes(plan: Plan, limit: int | None) -> int:
    """What of the model is held while it runs on a calibration text; the rest stays on the disk."""
    if plan.settings.calibration is None:
        return 0
    layers = [each.layer.parameters * DTYPE_BITS[each.layer.dtype] // 8 for each in plan.layers]
    weights = sum(layers) + sum(left.bytes for left in plan.left)
    held = weights if limit is None else min(weights, limit // 2)
    streams = 1 if plan.settings.calibration_order == "parallel" else 2
    if any(each.layer.expert for each in plan.layers):
        held += streams * _hidden_bytes(plan)  # what a block's experts are given
    return held if streams == 1 else held + _stream_bytes(plan, limit) + _block_bytes(plan)


def _stream_bytes(plan: Plan, limit: int | None) -> int:
    """Two hidden states for every token of the text; none where they are to lie on the disk."""
    needed = 2 * _hidden_bytes(plan)
    return needed if limit is None or needed <= limit * FOR_HIDDEN_STATES else 0


def _hidden_bytes(plan: Plan) -> int:
    """A hidden state for every token of the text. It is as wide as most layers' inputs."""
    assert plan.settings.calibration is not None
    widths = Counter(each.layer.in_features for each in plan.layers)
    width = max(widths, key=lambda width: widths[width])
    nbytes = DTYPE_BITS[plan.layers[0].layer.dtype] // 8
    return plan.settings.calibration.tokens * width * nbytes


def _block_bytes(plan: Plan) -> int:
    """Of the largest layer block, its weights."""
    blocks: Counter[int | None] = Counter()
    for each in plan.layers:
        size = each.layer.parameters * DTYPE_BITS[each.layer.dtype] // 8
        blocks[block_number(each.layer.module)] += size
    return max(blocks.values())


def _layer_bytes(plan: Plan, planned: PlannedLayer, machine: Machine, *, ahead: bool) -> int:
    """Memory that working on this layer takes, or measuring it before where that takes more."""
    return max(
        _working_bytes(plan.settings, planned, machine, ahead=ahead),
        _measuring_bytes(plan.settings, planned),
    )


def _measuring_bytes(settings: Settings, planned: PlannedLayer) -> int:
    """Memory of looking at what the layer loses (`core.rank_errors`)."""
    if not settings.is_measured:
        return 0
    weights, in_features = planned.layer.parameters, planned.layer.in_features
    stored = DTYPE_BITS[planned.layer.dtype] // 8
    vectors = _VECTORS * 4 * sketch_width(_most_rank(planned, settings)) * sum(planned.shape)
    inputs = 0
    if settings.start.needs_moments:
        inputs = 8 * weights + _MOMENTS * 4 * in_features**2  # W and W − Q as the inputs see them
    copied = 1 + planned.layer.turned
    return weights * (copied * stored + _MEASURING) + vectors * settings.rank_budget + inputs


def _most_rank(planned: PlannedLayer, settings: Settings) -> int:
    """The rank that the layer may get."""
    if not settings.rank_budget:
        return planned.rank
    return min(MOST_RANKS * planned.rank, *planned.shape)


def _working_bytes(
    settings: Settings, planned: PlannedLayer, machine: Machine, *, ahead: bool
) -> int:
    layer, weights, in_features = planned.layer, planned.layer.parameters, planned.shape[1]
    stored = DTYPE_BITS[layer.dtype] // 8
    if not settings.container.quantizes:
        return 0  # copied
    working = 0
    if _alternates(planned, settings):
        working = _VECTORS * 4 * sketch_width(_most_rank(planned, settings)) * sum(planned.shape)
    # A piece as it is stored, in float32, its part of the low rank and of the residual.
    piece = min(max(PIECE, 16 * in_features), weights) * (stored + 4 + 2 * machine.product_bytes)
    working += min(machine.threads, -(-weights // PIECE)) * piece
    codes = 3 * settings.container.working_bytes(planned.weight)
    if settings.start.needs_moments:
        copies, matrices = _CALIBRATED, _MOMENTS
        if settings.calibration_order == "sequential":
            copies, matrices = copies + _SEQUENTIAL, matrices + _DRIFT
        return copies * 4 * weights + matrices * 4 * in_features**2 + codes + working
    held = 1 + ahead + layer.turned
    if _takes_exact(planned, settings):
        return weights * (held * stored + 32) + working
    residual = settings.container.whole_bytes or machine.product_bytes
    aims = 4 if _alternates(planned, settings) and settings.iterations != 1 else 0
    return weights * (held * stored + residual + aims) + codes + working


def seconds(plan: Plan) -> float:
    """Computing time on two cores; reading and writing run beside it."""
    settings, start = plan.settings, plan.settings.start
    if not settings.container.quantizes:
        return 0.0
    iterations = settings.iterations or (_ITERATIONS if start.iterates else 1)
    searches = settings.container.searches and start.searches
    total = _passes(settings) * sum(each.layer.parameters for each in plan.layers) * _SECONDS_A_PASS
    for planned in plan.layers:
        weights = planned.layer.parameters
        if settings.start.needs_moments:
            each = planned.layer.in_features * _SECONDS_CALIBRATED_AND_INPUT
            total += weights * (_SECONDS_CALIBRATED + each)
        elif not _alternates(planned, settings):
            total += weights * (_SECONDS_FIRST_SEARCH if searches else _SECONDS_A_WEIGHT)
        elif _takes_exact(planned, settings):
            total += weights * min(planned.shape) * iterations * _SECONDS_EXACT
        else:
            each = _SECONDS_SEARCHED if searches else _SECONDS_A_WEIGHT
            each += planned.rank * _SECONDS_A_WEIGHT_AND_RANK
            total += weights * (iterations * each + _SECONDS_FIRST_SEARCH * searches)
            total += iterations * _SECONDS_AN_ITERATION
    return total


def _passes(settings: Settings) -> int:
    """Tokens that run through the model: in sequence more than once (`models.calibration`), and
    again while adapters are distilled."""
    if settings.calibration is None:
        return 0
    distilled = _RUNS * _STEP * (settings.distill_steps or 0)
    often = 6 if settings.calibration_order == "sequential" else 1
    return distilled + often * settings.calibration.tokens


def _alternates(planned: PlannedLayer, settings: Settings) -> bool:
    start = settings.start
    return planned.adapted and start.corrects and not start.needs_moments


def _takes_exact(planned: PlannedLayer, settings: Settings) -> bool:
    svd = "exact" if settings.start.svd == "exact" else settings.svd
    return _alternates(planned, settings) and takes_exact(planned.shape, planned.rank, svd)
