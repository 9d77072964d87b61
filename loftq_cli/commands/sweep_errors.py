"""What `sweep-ranks --error` measures, and how its document names it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loftq_cli import schema
from loftq_cli.report.units import removed

if TYPE_CHECKING:
    from loftq_cli.commands.run import Run
    from loftq_cli.engines.plan import PlannedLayer
    from loftq_cli.engines.rank_errors import ErrorCurves
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
) -> tuple[ErrorCurves, schema.CalibratedOn | None]:
    """The curves, and what the report says of the calibration text where there is one."""
    from loftq_cli import hardware
    from loftq_cli.engines.rank_errors import measure

    assert found.checkpoint is not None
    chosen = hardware.resolve_device(device)
    run.resolved("device", *chosen)
    if text is None:
        with run.timing("measure"), run.progress("measuring", len(planned)) as progress:
            measured = measure(
                planned, found.checkpoint, settings, ranks, device=chosen.value, progress=progress
            )
        return measured, None
    from loftq_cli.models.calibration import open_calibration

    layers = {each.layer.module: each for each in planned}
    with (
        open_calibration(
            found.checkpoint.directory,
            text,
            list(layers),
            device=chosen.value,
            max_memory_bytes=hardware.memory_bytes(),
        ) as inputs,
        run.timing("measure"),
        run.progress("measuring", len(planned)) as progress,
    ):
        measured = measure(
            [layers[module] for module in inputs.order],
            found.checkpoint,
            settings,
            ranks,
            device=chosen.value,
            progress=progress,
            moments=inputs.moments,
        )
        tokens = schema.CalibratedOn(
            sha256=inputs.text_sha256, windows=inputs.windows, tokens=inputs.tokens
        )
    return measured, tokens


def errors_at(measured: ErrorCurves | None, place: int) -> dict[str, float]:
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
