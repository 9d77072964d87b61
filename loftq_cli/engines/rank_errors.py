"""Measures a checkpoint's LoftQ error at many ranks: each weight is read and decomposed once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loftq_cli.checkpoint.index import Checkpoint
from loftq_cli.engines.placement import read_weight, with_fallback
from loftq_cli.engines.plan import PlannedLayer
from loftq_cli.engines.settings import Settings
from loftq_cli.engines.tasks import Moments
from loftq_cli.errors import LoftqError
from loftq_cli.record import Progress

if TYPE_CHECKING:
    import torch

    from loftq_cli.core.rank_errors import Curve, RankErrors


@dataclass(frozen=True)
class ErrorCurve:
    """Relative errors of all layers taken as one long vector, as `quantize` reports them."""

    quantized_only: float
    by_rank: list[float]


@dataclass(frozen=True)
class ErrorCurves:
    """``outputs`` is None without a calibration."""

    weights: ErrorCurve
    outputs: ErrorCurve | None


def measure(
    layers: Sequence[PlannedLayer],
    checkpoint: Checkpoint,
    settings: Settings,
    ranks: Sequence[int],
    *,
    device: str,
    progress: Progress,
    moments: Moments | None = None,
) -> ErrorCurves:
    """The curves over ``layers``; those without an adapter are quantized and no more.

    ``moments`` gives those of a module's inputs; it is asked in the order of ``layers``.
    """
    weights, outputs = _Sum(len(ranks)), _Sum(len(ranks))
    for planned in layers:
        progress.start(planned.layer.module)
        errors = _errors(planned, checkpoint, settings, ranks, device, moments)
        weights.add(errors.weights)
        if errors.outputs is not None:
            outputs.add(errors.outputs)
        progress.advance(planned.layer.module)
    return ErrorCurves(weights.curve(), None if moments is None else outputs.curve())


def _errors(
    planned: PlannedLayer,
    checkpoint: Checkpoint,
    settings: Settings,
    ranks: Sequence[int],
    device: str,
    moments: Moments | None,
) -> RankErrors:
    """Those of one layer."""
    from loftq_cli.core.rank_errors import rank_errors

    layer, wanted = planned.layer, ranks if planned.adapted else []
    seen = None if moments is None else moments(layer.module)

    def work(W: torch.Tensor) -> RankErrors:
        there = None if seen is None else seen.to(W.device)
        found: RankErrors = rank_errors(W, settings.quantizer(planned.bits), wanted, there)
        return found

    try:
        return with_fallback(work, read_weight(checkpoint, layer, device), device, lambda: None)
    except LoftqError as error:
        raise error.within(layer.tensor) from error


@dataclass
class _Sum:
    """The curves of several layers, to become one."""

    ranks: int
    curves: list[Curve] = field(default_factory=list)

    def add(self, curve: Curve) -> None:
        self.curves.append(curve)

    def curve(self) -> ErrorCurve:
        whole = math.hypot(*(each.whole for each in self.curves)) or 1.0  # zeros have no error
        plain = math.hypot(*(each.quantized_only for each in self.curves))
        left = [
            math.hypot(
                *(each.by_rank[place] if each.by_rank else each.uncorrected for each in self.curves)
            )
            for place in range(self.ranks)
        ]
        return ErrorCurve(plain / whole, [each / whole for each in left])
