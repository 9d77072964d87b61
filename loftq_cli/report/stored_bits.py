"""Grids of a comparison side by side: how far from the original for how many bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from loftq_cli import starts
from loftq_cli.formats import DEFAULT_CONTAINER
from loftq_cli.report import units
from loftq_cli.report.formats import blocks_of
from loftq_cli.report.units import listed
from loftq_cli.schema import ComparedMethod, GridVerdict


def called(
    grid: str | None, container: str | None, block_size: int | None, experts: str | None = None
) -> str:
    """`int4 in blocks of 64 (gptq)`, `int4 in blocks of 64 (gptq, experts kept)`."""
    kept = ", experts kept" if experts == "keep" else ""
    return f"{grid}{blocks(block_size)} ({container}{kept})"


def blocks(size: int | None) -> str:
    if size is None:
        return ""
    return f" in {blocks_of(size)}"


def by_stored_bits(methods: Sequence[ComparedMethod]) -> list[GridVerdict]:
    """The grids of quantized methods, the smallest first; none where all take the same room.

    Of those that take the same, the one with the lower KL comes first.
    """
    groups: dict[tuple[object, ...], list[ComparedMethod]] = {}
    for each in methods:
        groups.setdefault((each.grid, each.container, each.block_size, each.experts), []).append(
            each
        )
    if len({_size(here) for here in groups.values()}) < 2:
        return []
    found = sorted(groups.values(), key=lambda here: (*_size(here), _least(here)))
    verdicts: list[GridVerdict] = []
    lowest = math.inf
    for here in found:
        first, own = here[0], _least(here)
        verdicts.append(
            GridVerdict(
                grid=first.grid or f"{first.bits} bits",
                container=first.container or DEFAULT_CONTAINER,
                block_size=first.block_size,
                experts=first.experts,
                stored_bits=first.stored_bits,
                backbone_bytes=first.backbone_bytes,
                least=own < lowest,
                **_best(here, "data_free", calibrated=False),
                **_best(here, "calibrated", calibrated=True),
            )
        )
        lowest = min(lowest, own)
    return verdicts


def least_sentence(grids: Sequence[GridVerdict]) -> str:
    """Which grid is nearest at or under each stored size, and which are not worth their bytes."""
    best = [f"{_sized(each)} (KL {_kl(each)})" for each in grids if each.least]
    rest = [_sized(each) for each in grids if not each.least]
    if not best:
        return "Of their bytes nothing can be said: no KL divergence is a number."
    sentence = f"Nearest to the original for its bytes: {listed(best)}."
    return f"{sentence} No nearer for as many bytes or more: {listed(rest)}." if rest else sentence


def _best(here: Sequence[ComparedMethod], kind: str, *, calibrated: bool) -> dict[str, Any]:
    those = [
        each
        for each in here
        if each.kl_divergence is not None
        and starts.of_report(each.init).needs_moments == calibrated
    ]
    best = min(those, key=lambda each: each.kl_divergence or 0.0, default=None)
    if best is None:
        return {}
    return {f"{kind}_init": best.init, f"{kind}_kl": best.kl_divergence}


def _size(here: Sequence[ComparedMethod]) -> tuple[int, float]:
    """What the files take: stored bits alone say nothing of experts that are kept."""
    return here[0].backbone_bytes, here[0].stored_bits


def _least(here: Sequence[ComparedMethod]) -> float:
    return min(
        (each.kl_divergence for each in here if each.kl_divergence is not None), default=math.inf
    )


def _kl(grid: GridVerdict) -> str:
    known = [each for each in (grid.data_free_kl, grid.calibrated_kl) if each is not None]
    return units.small(min(known))


def _sized(grid: GridVerdict) -> str:
    name = called(grid.grid, grid.container, grid.block_size, grid.experts)
    return f"{name} with {units.plain(grid.stored_bits)} stored bits"
