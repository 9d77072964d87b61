"""What a run will need, told before it starts: memory and time, from the plan alone.

Memory is the sum of what is held at once for the largest layer, beside the libraries themselves
and the adapters of one output file. In bytes a weight of that layer:

    2 × dtype   the weight that is worked on, and the next one, which is read meanwhile; one more
                while a transposed weight is turned
    2 or 4      the residual, in the dtype of the sketches
    3 × ⁹⁄₁₆    codes: this iterate's, the best one's, and a finished layer's that wait for the disk
    20 + 3      instead of the last two in 8 bits, which are worked on whole
    32          instead of them with the exact SVD: residual, U, V and LAPACK's workspace

and besides, for every direction of a sketch, ten vectors as long as a column and a row.
Without the reading ahead one dtype less is held. By rows (`Level.ROWS`) neither weight nor
residual is, but a slab of the residual's columns and the pieces that the threads are at.

Measured on two cores (VmHWM, MB) against what is told here, in the order of the levels:

    the demo, rank 16                               513  608     513  608     513  608
    GPT-2 (124M, Conv1D, bfloat16), rank 16         577  659     601  654     606  654
    one block of a 7B Llama, bfloat16, rank 64      922 1036     822  946     721  799
    the same with float32 sketches                 1036 1135     955 1045     791  841
    the same in 8 bits, which cannot go by rows    1742 1907    1647 1817    1719 1817

Time is a rate that was measured on two cores (README, "How fast"); other machines differ by their
own factor.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from loftq_cli.checkpoint.safetensors import DTYPE_BITS
from loftq_cli.core.sketches import PIECE, sketch_width, slab_columns, takes_exact
from loftq_cli.engines.plan import Plan, PlannedLayer, Settings

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
_SECONDS_A_WEIGHT = 1.3e-9
_SECONDS_A_WEIGHT_AND_RANK = 2.0e-11
_SECONDS_EXACT = 2.0e-10

# Smaller layers are never streamed: as `core` has it, the compiled kernels are not used for them.
_WORTH_STREAMING = 1 << 16


class Level(IntEnum):
    """How little of a layer is held at once. The files are the same bytes at every level."""

    AHEAD = 1  # the next layer is read while one is worked on
    ALONE = 2  # one layer at a time
    ROWS = 3  # a layer's rows are read anew in every pass, its residual is formed anew


class Machine(NamedTuple):
    """What of the machine decides about memory."""

    product_bytes: int = 4  # of a number in the sketches; 2 where bfloat16 is multiplied natively
    threads: int = 2


def by_rows(planned: PlannedLayer, settings: Settings) -> bool:
    """Whether this layer can be worked on by rows.

    Not if the rows on disk are columns, if an exact SVD wants all of it, or in 8 bits.
    """
    alternates = planned.adapted and settings.init == "loftq"
    return (
        settings.bits == 4
        and not planned.layer.transposed
        and planned.layer.parameters >= _WORTH_STREAMING
        and not (alternates and takes_exact(planned.shape, settings.rank, settings.svd))
    )


def memory_bytes(plan: Plan, level: Level, machine: Machine) -> int:
    """Peak resident memory of a run on the CPU."""
    largest = largest_layer(plan, level, machine)
    layer = 0 if largest is None else layer_bytes(plan, largest, level, machine)
    adapters = max(
        sum(tensor.nbytes for tensor in plan.adapter_tensors(task.layers)) for task in plan.tasks
    )
    return LIBRARY_BYTES + _COPYING_BYTES + layer + adapters


def largest_layer(plan: Plan, level: Level, machine: Machine) -> PlannedLayer | None:
    """The layer that takes the most memory."""
    return max(
        plan.layers,
        key=lambda planned: layer_bytes(plan, planned, level, machine),
        default=None,
    )


def layer_bytes(plan: Plan, planned: PlannedLayer, level: Level, machine: Machine) -> int:
    """Memory that working on this layer takes."""
    product_bytes = machine.product_bytes
    settings, layer = plan.settings, planned.layer
    weights, (out_features, in_features) = layer.parameters, planned.shape
    stored = DTYPE_BITS[layer.dtype] // 8
    alternates = planned.adapted and settings.init == "loftq"
    exact = alternates and takes_exact(planned.shape, settings.rank, settings.svd)
    vectors = _VECTORS * 4 * sketch_width(settings.rank) if alternates else 0
    working = vectors * (out_features + in_features)
    # A piece as it is stored, in float32, its part of the low rank and of the residual.
    piece = min(max(PIECE, 16 * in_features), weights) * (stored + 4 + 2 * product_bytes)
    working += min(machine.threads, -(-weights // PIECE)) * piece
    if settings.bits == 8:
        # Codes of a byte; the residual and, for the last one, what it is made of: five float32.
        codes, product_bytes = 3 * weights, 20
    else:
        codes = 3 * weights * 9 // 16
    if level == Level.ROWS and by_rows(planned, settings):
        columns = min(slab_columns(out_features, settings.block_size), in_features)
        return codes + working + out_features * columns * product_bytes
    held = (1 if level >= Level.ALONE else 2) + layer.transposed
    if exact:
        return weights * (held * stored + 32) + working
    return weights * (held * stored + product_bytes) + codes + working


def seconds(plan: Plan) -> float:
    """Computing time on two cores; reading and writing run beside it."""
    settings = plan.settings
    total = 0.0
    for planned in plan.layers:
        weights = planned.layer.parameters
        if not planned.adapted or settings.init == "qlora":
            total += weights * _SECONDS_A_WEIGHT
        elif settings.svd == "exact":
            total += weights * min(planned.shape) * settings.iterations * _SECONDS_EXACT
        else:
            each = _SECONDS_A_WEIGHT + settings.rank * _SECONDS_A_WEIGHT_AND_RANK
            total += weights * settings.iterations * each
    return total
