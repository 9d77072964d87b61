"""What `sweep-ranks --error` measures, and how its document names it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli import schema
from loftq_cli.report.units import removed

if TYPE_CHECKING:
    import torch

    from loftq_cli.commands.run import Run
    from loftq_cli.core.rank_errors import RankErrors
    from loftq_cli.engines.plan import PlannedLayer
    from loftq_cli.engines.settings import Settings
    from loftq_cli.models.lookup import FoundModel


def measure_errors(
    run: Run,
    found: FoundModel,
    planned: list[PlannedLayer],
    settings: Settings,
    ranks: list[int],
    device: str,
    text: Path | None,
) -> tuple[RankErrors, schema.CalibratedOn | None]:
    """The errors of all layers taken as one long vector, relative to it, and what the report says
    of the calibration text where there is one. Layers without an adapter are quantized and no more.
    """
    from loftq_cli import hardware
    from loftq_cli.core.rank_errors import Curve, RankErrors, rank_errors
    from loftq_cli.engines.placement import measure
    from loftq_cli.engines.results import calibrated_on

    assert found.checkpoint is not None
    device, why = hardware.resolve_device(device)
    run.resolved("device", device, why)

    def work(planned: PlannedLayer, seen: torch.Tensor | None, W: torch.Tensor) -> RankErrors:
        wanted = ranks if planned.adapted else []
        errors: RankErrors = rank_errors(W, settings.quantizer(planned.bits), wanted, seen)
        return errors

    inputs: Any = nullcontext()
    if text is not None:
        from loftq_cli.models.calibration import open_calibration

        inputs = open_calibration(
            found.checkpoint.directory,
            text,
            [each.layer.module for each in planned if not each.layer.expert],
            device=device,
            max_memory_bytes=hardware.memory_bytes(),
        )
    with (
        inputs as seen,
        run.timing("measure"),
        run.progress("measuring", len(planned)) as progress,
    ):
        errors = measure(
            work, planned, found.checkpoint, device=device, progress=progress, inputs=seen
        )
        weights = Curve.together([each.weights for each in errors.values()], len(ranks))
        outputs = [each.outputs for each in errors.values() if each.outputs is not None]
        return (
            RankErrors(weights, Curve.together(outputs, len(ranks)) if outputs else None),
            None if seen is None else calibrated_on(seen),
        )


def errors_at(measured: RankErrors | None, place: int) -> dict[str, float]:
    """The fields of the errors at one of the ranks."""
    found: dict[str, float] = {}
    if measured is None:
        return found
    for what, curve in (("weight", measured.weights), ("output", measured.outputs)):
        if curve is not None:
            left = curve.by_rank[place]
            found[f"{what}_error_relative"] = left
            found[f"{what}_error_removed"] = removed(curve.quantized_only, left)
    return found
