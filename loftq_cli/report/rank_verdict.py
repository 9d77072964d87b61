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
    room = units.size(vram_bytes or 0)
    if vram_bytes is not None and not fitting:
        needed = units.size(costs[0].memory.total_with_checkpointing_bytes)
        return _verdict(
            None,
            "memory",
            f"nothing fits in {room}: rank {costs[0].rank} takes about {needed} "
            "even with gradient checkpointing",
        )
    if quantized_only_error is not None:
        if quantized_only_output_error is not None:
            rank, why = _by_error(fitting, "output", quantized_only_output_error)
        else:
            rank, why = _by_error(fitting, "weight", quantized_only_error)
        where = f" among those that fit in {room}" if len(fitting) < len(costs) else ""
        return _verdict(rank, "error", f"rank {rank}{where}{condition}: {why}")
    if vram_bytes is not None:
        largest = fitting[-1]
        needed = units.size(
            largest.memory.total_with_checkpointing_bytes
            if condition
            else largest.memory.total_bytes
        )
        which = "the largest of these that fits" if len(costs) > 1 else "it fits"
        sentence = f"rank {largest.rank}: {which} in {room}{condition} (about {needed})"
        return _verdict(largest.rank, "memory", sentence)
    return _by_cost(costs)


def _by_error(
    costs: Sequence[RankCost], what: Literal["weight", "output"], plain: float
) -> tuple[int, str]:
    """The last rank that a worthwhile doubling leads to, and why."""
    errors = [getattr(cost, f"{what}_error_relative") or 0.0 for cost in costs]
    steps = pairwise(zip(costs, errors, strict=True))
    # The share of the error that one doubling takes away, if a step takes what it does.
    gains = [
        1 - (after / before) ** (1 / math.log2(high.rank / low.rank)) if before else 0.0
        for (low, before), (high, after) in steps
    ]
    chosen = max(
        (n for n, gain in enumerate(gains, start=1) if gain >= WORTHWHILE_SHARE), default=0
    )
    why = f"the {what} error falls from {units.percent(plain)} to {units.percent(errors[chosen])}"
    if chosen < len(gains):
        later = units.percent(max(gains[chosen:]))
        why += f", and no further doubling takes away more than {later} of it"
    elif gains:
        why += f", and the last doubling still took away {units.percent(gains[-1])} of it"
    return costs[chosen].rank, why


def _by_cost(costs: Sequence[RankCost]) -> Verdict:
    """The largest rank whose adapter, gradients and optimizer are small change."""
    held = {
        cost.rank: cost.memory.adapter_bytes
        + cost.memory.gradients_bytes
        + cost.memory.optimizer_bytes
        for cost in costs
    }
    small = [cost for cost in costs if held[cost.rank] / cost.memory.total_bytes <= SMALL_SHARE]
    best = small[-1] if small else costs[0]
    limit = f"{100 * SMALL_SHARE:.0f} %"
    why = f"adapter, gradients and optimizer take more than {limit} of the memory even here"
    if small:
        why = f"up to here adapter, gradients and optimizer take at most {limit} of the memory"
    sizes = f"{units.size(held[best.rank])} of about {units.size(best.memory.total_bytes)}"
    return _verdict(best.rank, "cost", f"rank {best.rank}: {why} ({sizes})")


def _verdict(
    rank: int | None, reason: Literal["error", "memory", "cost"], sentence: str
) -> Verdict:
    sentence = f"{sentence[:1].upper()}{sentence[1:]}."
    return Verdict(recommended_rank=rank, reason=reason, sentence=sentence)
