"""From the report in a written directory to what is checked, and from there to a certificate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from loftq_cli import schema, starts
from loftq_cli.checks.battery import Outcome
from loftq_cli.checks.written.directory import ClaimedFile, ClaimedLayer, Claims
from loftq_cli.checks.written.residuals import LayerResidual, Residuals
from loftq_cli.containers import container_of
from loftq_cli.containers.base import Container
from loftq_cli.engines.report_file import NOT_OURS, Report
from loftq_cli.errors import CorruptCheckpoint, UsageError
from loftq_cli.formats import DTYPE_NAMES
from loftq_cli.models.source import REPORT_FILE
from loftq_cli.report.quantize import auto_class


def claims_of(report: Report) -> Claims:
    """What the report says, in the form that the checks want.

    Raises:
        CorruptCheckpoint: it names a format that loftq never wrote.
    """
    results = report.results
    settings = results.settings
    container = _container(settings)
    if container is None or settings.rank < 1 or not settings.lora_alpha > 0:
        raise _unusable(
            f"{settings.bits} bits, {settings.quant_type!r:.40}, block size {settings.block_size}, "
            f"rank {settings.rank}, lora_alpha {settings.lora_alpha}"
        )
    if settings.dtype not in (None, *DTYPE_NAMES.values()):
        raise _unusable(f"dtype {settings.dtype!r:.40}")
    return Claims(
        source=_source_name(report),
        container=container,
        rank=settings.rank,
        lora_alpha=settings.lora_alpha,
        use_rslora=settings.rslora,
        corrects=starts.of_report(settings.init).corrects,
        task_type=results.task_type,
        auto_class=auto_class(results),
        weight_error=results.totals.weight_error_relative,
        dtype=settings.dtype,
        calibrated=settings.calibration is not None,
        layers=_layers(results, container),
        files=[ClaimedFile(file.name, file.bytes, file.sha256) for file in results.files],
        source_files=frozenset(
            (file.name, file.bytes, file.header_sha256) for file in results.source_files
        ),
    )


def _container(settings: schema.QuantizeSettings) -> Container | None:
    """The container with the options of the report; None where there is none that takes them."""
    try:
        return container_of(settings.bits, settings)
    except (KeyError, UsageError):
        return None


def _layers(results: schema.QuantizeResults, container: Container) -> list[ClaimedLayer]:
    """All layers, once their bits and ranks have been seen to be such as loftq writes."""
    adapted = [
        ClaimedLayer(
            layer.name,
            layer.shape,
            layer.bits or 0,
            layer.rank or 0,
            layer.stored_rank or layer.rank or 0,
            layer.weight_error_relative,
        )
        for layer in results.layers
    ]
    # Before there was a search for the absmax, plain quantization was all that such a layer had.
    plain = [
        ClaimedLayer(
            layer.name,
            layer.shape,
            layer.bits or 0,
            0,
            0,
            layer.quantized_only_error_relative
            if layer.weight_error_relative is None
            else layer.weight_error_relative,
        )
        for layer in results.without_adapter
    ]
    for layer in adapted:
        if not 1 <= layer.rank <= layer.stored_rank:
            raise _unusable(f"{layer.name} has rank {layer.rank}, stored as {layer.stored_rank}")
    for layer in (*adapted, *plain):
        if layer.bits not in container.widths:
            raise _unusable(f"{layer.name} has {layer.bits} bits in {container.quant_type!r:.40}")
    return [*adapted, *plain]


def _unusable(cause: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"{REPORT_FILE} cannot be used",
        cause=f"its settings are none that loftq writes: {cause}",
        hint=NOT_OURS,
    )


def certificate_of(
    directory: Path, claims: Claims, outcomes: Sequence[Outcome], residuals: Residuals
) -> schema.VerifyResults:
    """The certificate."""
    tests = [
        schema.CheckTest(
            name=each.check.name,
            group=each.check.group,
            status=each.status,
            seconds=each.seconds,
            verified=each.check.verifies,
            detail=each.finding.detail,
            figures=each.finding.figures,
            cause=each.cause,
            hint=each.hint,
        )
        for each in outcomes
    ]
    passed, failed, skipped = (
        sum(test.status == status for test in tests) for status in ("passed", "failed", "skipped")
    )
    return schema.VerifyResults(
        directory=str(directory),
        source=None if residuals.source is None else residuals.source.identity.id,
        quantized_layers=len(claims.quantized),
        measured_layers=len(residuals.measured),
        tests=tests,
        layers=[_layer(each) for each in residuals.measured],
        summary=schema.CheckSummary(
            total=len(tests),
            passed=passed,
            failed=failed,
            skipped=skipped,
            seconds=math.fsum(test.seconds for test in tests),
        ),
    )


def _layer(measured: LayerResidual) -> schema.VerifiedLayer:
    return schema.VerifiedLayer(
        name=measured.name,
        shape=measured.shape,
        weight_error_relative=measured.error if math.isfinite(measured.error) else None,
        reported_weight_error_relative=measured.reported,
        agrees=measured.agrees,
    )


def _source_name(report: Report) -> str:
    model = report.model
    if model is None:
        return "a model that the report does not name"
    return model.id if model.revision is None else f"{model.id}@{model.revision}"
