"""From a plan and what came out of it to the results in the document of `quantize`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loftq_cli import schema
from loftq_cli.engines.plan import Plan, PlannedLayer, stored
from loftq_cli.engines.settings import Settings
from loftq_cli.models.layers import last_part

if TYPE_CHECKING:
    from loftq_cli.checkpoint.index import Checkpoint
    from loftq_cli.checkpoint.writer import WrittenFile
    from loftq_cli.engines.tasks import LayerOutcome
    from loftq_cli.models.calibration import Calibration


def quantize_results(
    plan: Plan,
    checkpoint: Checkpoint,
    *,
    output: str,
    architecture: str,
    task_type: str | None,
    outcomes: Sequence[LayerOutcome] = (),
    files: Sequence[WrittenFile] = (),
    fingerprint: str | None = None,
    calibration: schema.CalibratedOn | None = None,
    seconds: float | None = None,
    peak_memory_bytes: int | None = None,
) -> schema.QuantizeResults:
    """The results; without outcomes those of a dry run, whose measured fields are null."""
    measured = {outcome.name: outcome for outcome in outcomes}
    settings = plan.settings
    # What the layers lose decides of these, and nobody has looked yet.
    bits_open = not outcomes and settings.target_bits is not None
    ranks_open = not outcomes and settings.rank_budget
    total_bytes = sum(info.nbytes for info in checkpoint.infos)

    def share(tensor: str) -> tuple[int, float]:
        nbytes = checkpoint.tensors[tensor][1].nbytes
        return nbytes, nbytes / total_bytes

    def adapted(planned: PlannedLayer) -> schema.AdaptedLayer:
        outcome = measured.get(planned.layer.module)
        nbytes, share_of_bytes = share(planned.layer.tensor)
        return schema.AdaptedLayer(
            name=planned.layer.module,
            shape=planned.shape,
            bits=None if bits_open else planned.bits,
            rank=None if ranks_open else planned.rank,
            stored_rank=planned.stored_rank if planned.padding else None,
            **_errors(outcome),
            iterations=len(outcome.error_curve) if outcome else settings.iterations or 0,
            best_iteration=outcome.best_iteration if outcome else None,
            error_curve=outcome.error_curve if outcome else [],
            seconds=outcome.seconds if outcome else None,
            bytes=nbytes,
            share_of_bytes=share_of_bytes,
        )

    def plain(planned: PlannedLayer) -> schema.PlainLayer:
        nbytes, share_of_bytes = share(planned.layer.tensor)
        return schema.PlainLayer(
            name=planned.layer.module,
            shape=planned.shape,
            bits=None if bits_open else planned.bits,
            reason="not among --target-modules",
            **_errors(measured.get(planned.layer.module)),
            bytes=nbytes,
            share_of_bytes=share_of_bytes,
        )

    stored_bits, information_bits = _bits_a_weight(plan)
    if bits_open and settings.target_bits is not None:
        code_bits = settings.container.code_bits(settings.bits)
        information_bits = stored_bits - (code_bits - settings.target_bits)
    return schema.QuantizeResults(
        output=output,
        dry_run=not outcomes,
        architecture=architecture,
        task_type=task_type,
        conv1d=sorted(
            {last_part(each.layer.module) for each in plan.layers if each.layer.transposed}
        ),
        fingerprint=fingerprint,
        settings=_settings(settings, calibration),
        layers=[adapted(planned) for planned in plan.layers if planned.adapted],
        without_adapter=[plain(planned) for planned in plan.layers if not planned.adapted],
        untouched=[
            schema.UntouchedTensor(
                name=left.tensor,
                shape=list(left.shape),
                reason=left.reason,
                bytes=left.bytes,
                share_of_bytes=left.bytes / total_bytes,
            )
            for left in plan.left
        ],
        files=[schema.WrittenFile(name=f.name, bytes=f.bytes, sha256=f.sha256) for f in files],
        source_files=[
            schema.SourceFile(name=name, bytes=header.file_bytes, header_sha256=header.sha256)
            for name, header in sorted(checkpoint.headers.items())
        ],
        totals=schema.QuantizeTotals(
            weight_error_relative=_overall(outcomes, "error", "norm"),
            quantized_only_error_relative=_overall(outcomes, "quantized_only_error", "norm"),
            output_error_relative=_overall(outcomes, "output_error", "output_norm"),
            quantized_only_output_error_relative=_overall(
                outcomes, "quantized_only_output_error", "output_norm"
            ),
            stored_bits=stored_bits,
            information_bits=information_bits,
            input_bytes=total_bytes,
            output_bytes=plan.model_bytes,
            adapter_bytes=plan.adapter_bytes,
            peak_memory_bytes=peak_memory_bytes,
            parameters=sum(info.elements for info in checkpoint.infos),
            trainable_parameters=plan.trainable_parameters,
            seconds=seconds,
        ),
    )


def _errors(outcome: LayerOutcome | None) -> dict[str, float | None]:
    if outcome is None:
        return {}
    return {
        "weight_error_relative": outcome.error,
        "quantized_only_error_relative": outcome.quantized_only_error,
        "output_error_relative": outcome.output_error,
        "quantized_only_output_error_relative": outcome.quantized_only_output_error,
    }


def _settings(
    settings: Settings, calibration: schema.CalibratedOn | None
) -> schema.QuantizeSettings:
    container = settings.container
    return schema.QuantizeSettings(
        bits=settings.bits,
        leading=settings.leading,
        target_bits=settings.target_bits,
        quant_type=container.quant_type,
        block_size=container.block_size,
        double_quant=container.double_quant,
        rank=settings.rank,
        rank_budget=settings.rank_budget,
        uniform_rank=settings.uniform_rank,
        lora_alpha=settings.lora_alpha,
        rslora=settings.use_rslora,
        iterations=settings.iterations,
        init=settings.init,
        calibration=calibration,
        svd=settings.svd,
        target_modules=list(settings.target_modules),
        seed=settings.seed,
        dtype=settings.dtype,
    )


def calibration_of(
    settings: Settings, calibration: Calibration | None = None
) -> schema.CalibratedOn | None:
    """What the report says of the calibration text; ``calibration`` once it was looked at."""
    if settings.calibration is None:
        return None
    return schema.CalibratedOn(
        sha256=settings.calibration.sha256,
        windows=None if calibration is None else calibration.windows,
        tokens=None if calibration is None else calibration.tokens,
    )


def _bits_a_weight(plan: Plan) -> tuple[float, float]:
    """(what a weight takes in the file, what its code and scale tell), over the planned layers."""
    in_file = 8 * sum(
        tensor.nbytes for each in plan.layers for tensor in stored(each, plan.settings)
    )
    weights = sum(planned.layer.parameters for planned in plan.layers)
    spared = sum(
        (plan.settings.container.code_bits(planned.bits) - planned.bits) * planned.layer.parameters
        for planned in plan.layers
    )
    return in_file / weights, (in_file - spared) / weights


def _overall(outcomes: Sequence[LayerOutcome], field: str, norm: str) -> float | None:
    """The relative error of all layers taken as one long vector; None where one is not known."""
    errors = [getattr(outcome, field) for outcome in outcomes]
    if not outcomes or None in errors:
        return None
    norms = [getattr(outcome, norm) for outcome in outcomes]
    lost = math.hypot(*(error * size for error, size in zip(errors, norms, strict=True)))
    whole = math.hypot(*norms)
    return lost / whole if whole else 0.0
