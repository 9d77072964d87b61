"""Measures a checkpoint's LoftQ error at many ranks: each weight is read and decomposed once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loftq_cli.checkpoint.index import Checkpoint
from loftq_cli.checkpoint.tensors import load_tensor
from loftq_cli.engines.plan import PlannedLayer, Settings
from loftq_cli.engines.tasks import Progress, quantizer
from loftq_cli.errors import LoftqError


@dataclass(frozen=True)
class ErrorCurve:
    """Relative errors of all quantized weights taken as one long vector, as `quantize` reports."""

    quantized_only: float
    by_rank: list[float]


def measure(
    layers: Sequence[PlannedLayer],
    checkpoint: Checkpoint,
    settings: Settings,
    ranks: Sequence[int],
    *,
    device: str,
    progress: Progress,
) -> ErrorCurve:
    """The curve over ``layers``; those without an adapter are quantized and no more."""
    from loftq_cli.core.rank_errors import rank_errors

    method = quantizer(settings)
    weight: list[float] = []
    plain: list[float] = []
    corrected: list[list[float]] = [[] for _ in ranks]
    for planned in layers:
        layer = planned.layer
        progress.start(layer.module)
        W = load_tensor(*checkpoint.tensors[layer.tensor]).to(device)
        if layer.transposed:
            W = W.T.contiguous()
        try:
            errors = rank_errors(W, method, ranks if planned.adapted else [])
        except LoftqError as error:
            raise error.within(layer.tensor) from error
        weight.append(errors.weight)
        plain.append(errors.quantized_only)
        for norms, norm in zip(
            corrected, errors.by_rank or [errors.quantized_only] * len(ranks), strict=True
        ):
            norms.append(norm)
        progress.advance(layer.module)
    whole = math.hypot(*weight) or 1.0  # all-zero weights have errors of zero
    return ErrorCurve(
        math.hypot(*plain) / whole, [math.hypot(*norms) / whole for norms in corrected]
    )
