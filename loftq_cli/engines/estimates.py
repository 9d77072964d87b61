"""What a run will need, told before it starts: memory and time, from the plan alone.

Memory is the sum of what is held at once, in bytes a weight of the largest layer:

    2 × dtype   the weight that is worked on, and the next one, which is read meanwhile
    4           the residual, in the dtype of the sketches or in float32
    3           codes: this iterate's, the best one's, and finished layers waiting for the disk
    32          instead of the last two with the exact SVD: residual, U, V and LAPACK's workspace

beside the libraries themselves and the adapters of one output file. Time is a rate that was
measured on two cores (README, "How fast"); other machines differ by their own factor.
"""

from __future__ import annotations

from loftq_cli.checkpoint.safetensors import DTYPE_BITS
from loftq_cli.engines.plan import Plan, PlannedLayer

# Python, torch, transformers and the compiled kernels, resident after a run on a tiny model.
LIBRARY_BYTES = 560_000_000

# Seconds a weight and iteration on two cores: a part for every weight, and one that grows with
# the rank. Exact SVDs grow with the layer's smaller side instead.
_SECONDS_A_WEIGHT = 2.0e-9
_SECONDS_A_WEIGHT_AND_RANK = 5.0e-11
_SECONDS_EXACT = 2.0e-10


def memory_bytes(plan: Plan) -> int:
    """Peak resident memory of a run on the CPU."""
    layers = max((_layer_bytes(plan, planned) for planned in plan.layers), default=0)
    adapters = max(
        sum(tensor.nbytes for tensor in plan.adapter_tensors(task.layers)) for task in plan.tasks
    )
    return LIBRARY_BYTES + layers + adapters


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


def _layer_bytes(plan: Plan, planned: PlannedLayer) -> int:
    stored = DTYPE_BITS[planned.layer.dtype] // 8
    working = 32 if plan.settings.svd == "exact" and planned.adapted else 4 + 3
    return planned.layer.parameters * (2 * stored + working)
