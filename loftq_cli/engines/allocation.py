"""Bits and ranks by what the layers lose: one pass over the weights before the run itself.

Each weight is read once, and a few numbers of it are kept. What is compared across layers are
shares: how much of the energy of what a layer puts out is lost, ‖R·S‖² / ‖W·S‖² with R = W − Q and
S·Sᵀ the second moments of its inputs, or the identity where nobody has looked at them. Energies
themselves say little: norms and residual connections follow that make up for a layer's scale.

With moments every layer counts the same. Without, all layers lose about the same share, and small
ones would get the most for being cheap; there every weight counts the same instead, so that bits
and ranks go where the tails are heavy.

KL to the original on held-out text, of the demo (4 blocks) in one step at rank 8, at an average of
2.25, 2.5, 2.75 and 3.25 bits:

    without moments, every weight the same      0.208  0.150  0.120  0.031
    without moments, every layer the same       0.253  0.167  0.097  0.036
    with moments, every weight the same         0.312  0.160  0.074  0.032
    with moments, every layer the same          0.204  0.190  0.074  0.022

and with the ranks spread over the layers, at 4 and at 2 bits:

                        rank 8 everywhere    by shares           by energy
    without moments     0.00916  0.339       0.00885  0.302      0.00943  0.369
    with moments        0.00633  0.353       0.00599  0.325      0.00711  0.383
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from loftq_cli.checkpoint.index import Checkpoint
from loftq_cli.containers.fused import fused_groups
from loftq_cli.engines.placement import measure
from loftq_cli.engines.plan import Plan, PlannedLayer, block_number
from loftq_cli.engines.settings import Settings
from loftq_cli.engines.tasks import layer_seed
from loftq_cli.formats import MOST_RANKS
from loftq_cli.record import Progress

if TYPE_CHECKING:
    import torch

    from loftq_cli.core.rank_errors import ErrorShares
    from loftq_cli.models.calibration import Calibration


def allocate(
    plan: Plan,
    checkpoint: Checkpoint,
    *,
    device: str,
    progress: Progress,
    inputs: Calibration | None = None,
) -> Plan:
    """The plan with the bits and ranks that ``plan.settings`` want measured.

    The same settings and weights give the same plan on the same machine.

    Raises:
        NonFiniteWeight: a weight holds NaN or infinity.
    """
    from loftq_cli.core.rank_errors import error_shares

    settings = plan.settings

    def work(
        planned: PlannedLayer, seen: torch.Tensor | None, W: torch.Tensor
    ) -> list[ErrorShares]:
        shares: list[ErrorShares] = error_shares(
            W,
            [settings.quantizer(bits) for bits in _choices(planned, settings)],
            MOST_RANKS * settings.rank if settings.rank_budget and planned.adapted else 0,
            input_moments=seen,
            seed=layer_seed(settings.seed, planned.layer.module),
        )
        count = planned.layer.parameters if seen is None else 1
        return [each.times(count) for each in shares]

    found = measure(work, plan.layers, checkpoint, device=device, progress=progress, inputs=inputs)
    layers = _as_they_run(plan.layers)
    evened: list[list[str]] = []
    if settings.target_bits is not None:
        layers, evened = _with_bits(layers, found, settings, settings.target_bits)
    if settings.rank_budget:
        layers = _with_ranks(layers, found, settings)
    changed = {planned.layer.module: planned for planned in layers}
    return replace(
        plan,
        evened=tuple(tuple(group) for group in evened),
        tasks=tuple(
            replace(
                task,
                entries=tuple(
                    changed[entry.layer.module] if isinstance(entry, PlannedLayer) else entry
                    for entry in task.entries
                ),
            )
            for task in plan.tasks
        ),
    )


def _as_they_run(layers: Sequence[PlannedLayer]) -> list[PlannedLayer]:
    """Block after block: a checkpoint may have the tenth before the second."""
    return sorted(layers, key=lambda planned: block_number(planned.layer.module) or 0)


def _choices(planned: PlannedLayer, settings: Settings) -> tuple[int, ...]:
    """The bits that the layer may get."""
    return (planned.bits,) if settings.target_bits is None else settings.container.widths


def _with_bits(
    layers: Sequence[PlannedLayer],
    found: dict[str, list[ErrorShares]],
    settings: Settings,
    average: float,
) -> tuple[list[PlannedLayer], list[list[str]]]:
    """The layers with the bits that lose least together, ``average`` a weight or fewer.

    Beside them the groups whose layers have the same only because servers hold them as one.
    """
    from loftq_cli.core.budgets import spread_bits

    sizes = {planned.layer.module: planned.layer.parameters for planned in layers}
    lost = {name: [share.quantized_only for share in found[name]] for name in sizes}

    def spread(groups: list[list[str]]) -> dict[str, int]:
        together = [
            [sum(losses) for losses in zip(*(lost[name] for name in group), strict=True)]
            for group in groups
        ]
        counts = [sum(sizes[name] for name in group) for group in groups]
        bits = spread_bits(together, counts, settings.container.widths, average)
        return {name: each for group, each in zip(groups, bits, strict=True) for name in group}

    alone = spread([[name] for name in sizes])
    bits, evened = alone, []
    if settings.container.even_when_fused:
        groups = fused_groups(sizes)
        bits = spread(groups)
        evened = [group for group in groups if len({alone[name] for name in group}) > 1]
    return [replace(each, bits=bits[each.layer.module]) for each in layers], evened


def _with_ranks(
    layers: Sequence[PlannedLayer], found: dict[str, list[ErrorShares]], settings: Settings
) -> list[PlannedLayer]:
    """For adapted layers, ranks that have no more parameters than the same rank everywhere."""
    from loftq_cli.core.budgets import spread_ranks

    adapted = [planned for planned in layers if planned.adapted]
    prices = [sum(planned.shape) for planned in adapted]
    captured = [
        found[planned.layer.module][_choices(planned, settings).index(planned.bits)].captured
        for planned in adapted
    ]
    ranks = spread_ranks(captured, prices, settings.rank * sum(prices))
    largest = max(ranks)
    chosen = {
        planned.layer.module: replace(
            planned, rank=rank, padding=largest - rank if settings.uniform_rank else 0
        )
        for planned, rank in zip(adapted, ranks, strict=True)
    }
    return [chosen.get(planned.layer.module, planned) for planned in layers]
