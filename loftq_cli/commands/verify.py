"""`loftq verify`: a written directory, opened as its users will open it, and proved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loftq_cli.commands.options import Device, TrustRemoteCode
from loftq_cli.commands.run import Run, command
from loftq_cli.errors import CheckFailed

if TYPE_CHECKING:
    from loftq_cli.engines.report_file import Report
    from loftq_cli.models.spec import ResolvedModel
    from loftq_cli.schema import VerifyResults


@command("verify")
def verify(
    run: Run,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="What loftq quantize --output wrote.")
    ],
    source: Annotated[
        str | None,
        typer.Option(
            "--source",
            metavar="MODEL",
            help="The model it was made from: a directory, or a hub id in the cache.",
            show_default="as the report names it",
        ),
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(
            "--sample",
            min=1,
            metavar="N",
            help="Measure N layers against the source, spread over the model.",
            show_default="all",
        ),
    ] = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """
    \b
    loftq verify OUT
    loftq verify OUT --source ./original --sample 20
    loftq verify OUT --json > certificate.json

    Opens what quantize wrote and holds it against its own report: the hash of every file, every
    layer as bitsandbytes dequantizes it, the adapter as PEFT loads it, residuals measured again
    from the original weights, a forward pass. Nothing is downloaded. With a failure the exit
    code is 3.
    """
    from loftq_cli import hardware
    from loftq_cli.checks.written.source import reported_source, required_source
    from loftq_cli.engines.report_file import read_report

    report = read_report(directory)
    chosen = hardware.resolve_device(device)
    run.resolved("device", *chosen)
    model = None
    if source is not None:
        model = required_source(source)
    elif report.model is not None:
        model = reported_source(
            report.model.id, report.model.revision, is_hub_id=report.model.source == "hub"
        )
    results = certify(
        run,
        directory,
        report,
        model,
        sample=sample,
        device=chosen.value,
        trust_remote_code=trust_remote_code,
    )
    run.finish(results, model=report.model)
    require_passed(results)


def certify(
    run: Run,
    directory: Path,
    report: Report,
    source: ResolvedModel | None,
    *,
    device: str,
    sample: int | None = None,
    trust_remote_code: bool = False,
) -> VerifyResults:
    """Runs every check on the directory. What is wrong with it is in the results, not raised."""
    from loftq_cli import hardware
    from loftq_cli.checks.battery import run_checks
    from loftq_cli.checks.written.all import all_checks, count_steps
    from loftq_cli.checks.written.directory import Written
    from loftq_cli.checks.written.residuals import Residuals, spread
    from loftq_cli.commands.verify_result import certificate_of, claims_of

    claims = claims_of(report)
    with run.timing("import"):  # or the first check that needs them would seem slow
        import bitsandbytes  # noqa: F401
        import peft  # noqa: F401
    layers = [] if source is None else spread(claims.layers, sample)
    steps = count_steps(claims, len(layers))
    with run.timing("checks"), run.progress("verifying", steps) as progress:
        written = Written(directory, claims, device, progress, trust_remote_code)
        residuals = Residuals(written, source, layers)
        checks = all_checks(written, residuals, hardware.memory_bytes())
        outcomes = run_checks(checks, progress, trace=run.listener.trace)
    return certificate_of(directory, claims, outcomes, residuals)


def require_passed(results: VerifyResults) -> None:
    """Raises CheckFailed, naming what was found first, if any check failed."""
    failed = [test for test in results.tests if test.status == "failed"]
    if failed:
        first = failed[0]
        others = f" ({len(failed)} of {len(results.tests)} checks failed)"
        raise CheckFailed(
            f"{results.directory}: {first.detail}{others if len(failed) > 1 else ''}",
            cause=first.cause,
            hint=first.hint,
        )
