"""The whole `verify` run: from a written directory to a certificate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loftq_cli import hardware, options
from loftq_cli.checks.battery import run_checks
from loftq_cli.checks.written.all import all_checks, count_steps
from loftq_cli.checks.written.directory import Written
from loftq_cli.checks.written.report import certificate_of, claims_of
from loftq_cli.checks.written.residuals import Residuals, spread
from loftq_cli.checks.written.source import reported_source, required_source
from loftq_cli.engines.report_file import Report, read_report
from loftq_cli.errors import CheckFailed
from loftq_cli.models.spec import ResolvedModel
from loftq_cli.record import Record
from loftq_cli.schema import Document, VerifyResults


def verify_directory(
    record: Record,
    directory: Path,
    source: str | None = None,
    sample: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Document[VerifyResults]:
    """Holds a directory against its own report and against the model that it was made from.

    Args:
        source: that model's name, if not as the report has it.
        sample: measure so many layers against the source; None means all.
        dtype: what to ask transformers for in the forward pass; with "auto" nothing is asked for,
            as the directory's README has it.

    Raises:
        ModelNotFound: the directory is nothing that loftq wrote, or ``source`` is not on this disk.
    """
    report = read_report(directory)
    chosen = hardware.resolve_device(device)
    record.resolved("device", *chosen)
    model = None
    if source is not None:
        model = required_source(source)
    elif report.model is not None:
        model = reported_source(
            report.model.id, report.model.revision, is_hub_id=report.model.source == "hub"
        )
    results = certify(
        record,
        directory,
        report,
        model,
        sample=sample,
        device=chosen.value,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    return record.document(results, model=report.model)


def certify(
    record: Record,
    directory: Path,
    report: Report,
    source: ResolvedModel | None,
    *,
    device: str,
    dtype: str = "auto",
    sample: int | None = None,
    trust_remote_code: bool = False,
) -> VerifyResults:
    """Runs every check on the directory. What is wrong with it is in the results, not raised."""
    claims = claims_of(report)
    with record.timing("import"):  # or the first check that needs them would seem slow
        import bitsandbytes  # noqa: F401
        import peft  # noqa: F401
    layers = [] if source is None else spread(claims.layers, sample)
    steps = count_steps(claims, len(layers))
    with record.timing("checks"), record.progress("verifying", steps) as progress:
        written = Written(
            directory, claims, device, options.dtype(dtype), progress, trust_remote_code
        )
        residuals = Residuals(written, source, layers)
        checks = all_checks(written, residuals, hardware.memory_bytes())
        outcomes = run_checks(checks, progress, trace=record.listener.trace)
    return certificate_of(directory, claims, outcomes, residuals)


def require_passed(results: VerifyResults, document: Document[Any]) -> None:
    """Raises CheckFailed, naming what was found first, if any check failed.

    The error has ``document``, for a caller that does not print it.
    """
    failed = [test for test in results.tests if test.status == "failed"]
    if failed:
        first = failed[0]
        others = f" ({len(failed)} of {len(results.tests)} checks failed)"
        error = CheckFailed(
            f"{results.directory}: {first.detail}{others if len(failed) > 1 else ''}",
            cause=first.cause,
            hint=first.hint,
        )
        error.document = document
        raise error
