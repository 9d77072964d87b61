"""Which rank to take, in one sentence with its reason, drawn from the figures of a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from loftq_cli.report import units
from loftq_cli.schema import RankCost, Verdict

# A doubling of the rank is worth it if it takes away this share of the error that is left.
WORTHWHILE_SHARE = 0.05
# Up to this share of the whole memory, what the rank adds is small change.
SMALL_SHARE = 0.05


def verdict(
    costs: Sequence[RankCost],
    quantized_only_error: float | None,
    vram_bytes: int | None,
    quantized_only_output_error: float | None = None,
) -> Verdict:
    """The recommendation; by the error where it was measured, else by what fits, else by cost.

    Where the error of outputs is known, it is that.
    """
    costs = sorted(costs, key=lambda cost: cost.rank)
    fitting = [cost for cost in costs if cost.fits is not False]
    condition = ""
    if not fitting:
        fitting = [cost for cost in costs if cost.fits_with_checkpointing]
        condition = ", with gradient checkpointing"
    if vram_bytes is not None and not fitting:
        return _nothing_fits(costs[0], vram_bytes)
    if quantized_only_error is not None:
        if quantized_only_output_error is not None:
            found = _by_error(fitting, "output", quantized_only_output_error)
        else:
            found = _by_error(fitting, "weight", quantized_only_error)
        limited = len(fitting) < len(costs)
        where = f" among those that fit in {units.size(vram_bytes or 0)}" if limited else ""
        return _verdict(found[0], "error", f"rank {found[0]}{where}{condition}: {found[1]}")
    if vram_bytes is not None:
        largest = fitting[-1]
        needed = largest.memory.total_bytes
        if condition:
            needed = largest.memory.total_with_checkpointing_bytes
        which = "the largest of these that fits" if len(costs) > 1 else "it fits"
        return _verdict(
            largest.rank,
            "memory",
            f"rank {largest.rank}: {which} in {units.size(vram_bytes)}{condition} "
            f"(about {units.size(needed)})",
        )
    return _by_cost(costs)


def _by_error(
    costs: Sequence[RankCost], what: Literal["weight", "output"], plain: float
) -> tuple[int, str]:
    """The last rank that a worthwhile doubling leads to, and why."""
    chosen = 0
    errors = [getattr(cost, f"{what}_error_relative") or 0.0 for cost in costs]
    steps = pairwise(zip(costs, errors, strict=True))
    gains = [
        _gain_of_doubling(after / before, high.rank / low.rank) if before else 0.0
        for (low, before), (high, after) in steps
    ]
    for number, gain in enumerate(gains, start=1):
        if gain >= WORTHWHILE_SHARE:
            chosen = number
    best = costs[chosen]
    error = units.percent(errors[chosen])
    change = f"the {what} error falls from {units.percent(plain)} to {error}"
    if chosen < len(gains):
        later = units.percent(max(gains[chosen:]))
        return best.rank, f"{change}, and no further doubling takes away more than {later} of it"
    if gains:
        last = units.percent(gains[-1])
        return best.rank, f"{change}, and the last doubling still took away {last} of it"
    return best.rank, change


def _gain_of_doubling(left: float, growth: float) -> float:
    """The share of the error that one doubling takes away, if so much is left after ``growth``."""
    return float(1 - left ** (1 / math.log2(growth)))


def _by_cost(costs: Sequence[RankCost]) -> Verdict:
    shares = [_adapter_state(cost) / cost.memory.total_bytes for cost in costs]
    small = [cost for cost, share in zip(costs, shares, strict=True) if share <= SMALL_SHARE]
    best = small[-1] if small else costs[0]
    state = units.size(_adapter_state(best))
    total = units.size(best.memory.total_bytes)
    limit = f"{100 * SMALL_SHARE:.0f} %"
    if small:
        why = f"up to here adapter, gradients and optimizer take at most {limit} of the memory"
    else:
        why = f"adapter, gradients and optimizer take more than {limit} of the memory even here"
    return _verdict(best.rank, "cost", f"rank {best.rank}: {why} ({state} of about {total})")


def _adapter_state(cost: RankCost) -> int:
    memory = cost.memory
    return memory.adapter_bytes + memory.gradients_bytes + memory.optimizer_bytes


def _nothing_fits(smallest: RankCost, vram_bytes: int) -> Verdict:
    needed = units.size(smallest.memory.total_with_checkpointing_bytes)
    return _verdict(
        None,
        "memory",
        f"nothing fits in {units.size(vram_bytes)}: rank {smallest.rank} takes about {needed} "
        "even with gradient checkpointing",
    )


def _verdict(rank: int | None, reason: str, sentence: str) -> Verdict:
    return Verdict.model_validate(
        {
            "recommended_rank": rank,
            "reason": reason,
            "sentence": f"{sentence[:1].upper()}{sentence[1:]}.",
        }
    )
