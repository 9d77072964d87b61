"""The whole `verify` run: from a written directory to a certificate."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

from loftq_cli import hardware, options
from loftq_cli.checks.battery import Check, run_checks, summary
from loftq_cli.checks.written.adapter import adapter
from loftq_cli.checks.written.claims import claims_of
from loftq_cli.checks.written.container import container
from loftq_cli.checks.written.copies import copies
from loftq_cli.checks.written.directory import Written
from loftq_cli.checks.written.files import files
from loftq_cli.checks.written.forward import forward
from loftq_cli.checks.written.residuals import Residuals, spread
from loftq_cli.checks.written.totals import totals
from loftq_cli.engines.report_file import Report, read_report
from loftq_cli.errors import CheckFailed, LoftqError, ModelNotFound
from loftq_cli.models.spec import ResolvedModel, cached_model, hub_id, local_model
from loftq_cli.record import Record
from loftq_cli.schema import Document, VerifiedLayer, VerifyResults


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
    results = certify(
        record,
        directory,
        report,
        _reported_source(report) if source is None else _required_source(source),
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
    # Every file, every layer in the container and again against the source, and the checks' ends.
    steps = len(claims.results.files) + len(claims.layers) + len(layers) + 7
    with record.timing("checks"), record.progress("verifying", steps) as progress:
        written = Written(
            directory,
            claims,
            device,
            options.dtype(dtype),
            progress,
            trust_remote_code,
            report.environment.packages,
        )
        residuals = Residuals(written, source, layers)
        tests = run_checks(_checks(written, residuals), progress, trace=record.listener.trace)
    return VerifyResults(
        directory=str(directory),
        source=None if source is None else source.identity.id,
        quantized_layers=len(claims.quantized),
        measured_layers=len(residuals.measured),
        tests=tests,
        layers=[
            VerifiedLayer(
                name=each.name,
                shape=each.shape,
                weight_error_relative=each.error if math.isfinite(each.error) else None,
                reported_weight_error_relative=each.reported,
                agrees=each.agrees,
            )
            for each in residuals.measured
        ],
        summary=summary(tests),
    )


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


def _checks(written: Written, residuals: Residuals) -> list[Check]:
    """In the order in which a reader would lose trust.

    Wrong files do not keep the others from running: they say what is wrong with them.
    """
    form = written.claims.container
    opened = (
        f"{form.name} opens every quantized layer and dequantizes it as the reference does, with "
        "no more codes than its bits; the config names its format and every layer that is left out"
        if form.quantizes
        else "nothing is quantized, and every layer of the report is there with finite weights"
    )
    group, needs = "directory", ("container", "adapter")
    return [
        Check(
            "files",
            group,
            "every file is there with the size and hash of the report, and no other is",
            partial(files, written),
        ),
        Check("container", group, opened, partial(container, written)),
        Check(
            "adapter",
            group,
            "PEFT puts it on the reported layers in rank, shape and scaling, and it is finite",
            partial(adapter, written),
        ),
        Check(
            "totals",
            group,
            "every tensor is in a list of the report, and its totals are those of files and lists",
            partial(totals, written),
            needs,
        ),
        Check(
            "residuals",
            group,
            "weight, backbone and adapter leave what the report says, measured again in float64",
            residuals.check,
            needs,
        ),
        Check(
            "copies",
            group,
            "what is not quantized, the configuration and the files beside it are the source's",
            partial(copies, written, residuals.source),
            ("container", "adapter", "residuals"),
        ),
        Check(
            "forward",
            group,
            "transformers and PEFT load it as its README says; outputs and gradients are finite",
            partial(forward, written),
            needs,
        ),
    ]


def _required_source(spec: str) -> ResolvedModel:
    """The model that the user named: built in, a directory, or in the hub's cache.

    Raises:
        ModelNotFound: it is not on this disk.
        UsageError: it is no name of a model.
    """
    found = local_model(spec) or cached_model(*hub_id(spec))
    if found is None:
        raise ModelNotFound(
            f"'{spec}' is not on this disk",
            cause="it is no directory, and the hub's cache does not have all of it; verify "
            "downloads nothing",
            hint=f"hf download {spec.replace('@', ' --revision ')}",
        )
    return found


def _reported_source(report: Report) -> ResolvedModel | None:
    """The model that a report names; None if it is not at hand, for whatever reason."""
    model = report.model
    if model is None or report.results.merged is not None:
        return None
    try:
        if model.source == "hub":
            return cached_model(hub_id(model.id)[0], model.revision)
        return local_model(model.id)
    except LoftqError:
        return None
