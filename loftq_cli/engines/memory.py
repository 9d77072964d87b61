"""`--max-memory`: the lightest touch with which a run stays within a limit, decided from the plan.

Every level gives the same files; without reading ahead a run takes longer.
"""

from __future__ import annotations

from dataclasses import dataclass

from loftq_cli.engines.estimates import (
    Level,
    Machine,
    calibration_bytes,
    largest_layer,
    layer_bytes,
    memory_bytes,
)
from loftq_cli.engines.plan import Plan
from loftq_cli.errors import DoesNotFit

_MB = 10**6
NAMES = {Level.AHEAD: "read-ahead", Level.ALONE: "one-layer"}
_DOES = {
    Level.AHEAD: "the next layer is read while one is worked on",
    Level.ALONE: "one layer is held at a time",
}


@dataclass(frozen=True)
class MemoryPlan:
    """The level of a run, its estimated peak in bytes, and why."""

    level: Level
    peak_bytes: int
    reason: str

    @property
    def name(self) -> str:
        return NAMES[self.level]


def plan_memory(plan: Plan, limit: int | None, machine: Machine) -> MemoryPlan:
    """The first level whose estimate is within ``limit`` bytes (None: no limit).

    Raises:
        DoesNotFit: none is.
    """
    model = calibration_bytes(plan, limit)
    estimates = {level: model + memory_bytes(plan, level, machine) for level in Level}
    if limit is None:
        level = Level.AHEAD
        return MemoryPlan(level, estimates[level], f"{_DOES[level]}; no --max-memory")
    for level, peak in estimates.items():
        if peak <= limit:
            needs = f"about {_megabytes(peak)} of the {_megabytes(limit)} of --max-memory"
            return MemoryPlan(level, peak, f"{_DOES[level]}: {needs}")
    level, least = min(estimates.items(), key=lambda item: item[1])
    largest = largest_layer(plan, level, machine)
    assert largest is not None
    needed = layer_bytes(plan, largest, level, machine)
    out_features, in_features = largest.shape
    raise DoesNotFit(
        f"--max-memory {_megabytes(limit)} is too little for this model",
        cause=f"the largest layer, {largest.layer.module} ({out_features}×{in_features}), takes "
        f"{_megabytes(needed)} at the least, beside {_megabytes(least - needed)} "
        "for libraries and adapters",
        hint=f"--max-memory {_megabytes(least)} is the least that works",
    )


def _megabytes(count: int) -> str:
    """As --max-memory takes it, rounded up."""
    return f"{-(-count // _MB)}MB"
