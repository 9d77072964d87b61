"""`loftq check`: what a new box, or a new model on it, has to show before work begins."""

from __future__ import annotations

from contextlib import ExitStack

from loftq_cli.commands.run import Run, command
from loftq_cli.errors import CheckFailed


@command("check")
def check(
    run: Run,
    model: str = "demo",
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """
    \b
    loftq check --save results                       (with the built-in model)
    loftq check --model org/name
    loftq check --json | loftq report - --format md

    Tests this box, then one model on it: the 4-bit and 8-bit kernels code for code, arithmetic
    and its speed, loading, adapters at five ranks and three target settings against PEFT's counts,
    generation, and quantize with its files loaded and measured again. One failure does not stop
    the others; with any, the exit code is 3.
    """
    from loftq_cli.checks import all as checks
    from loftq_cli.checks.battery import run_checks, summary
    from loftq_cli.checks.model import Subject
    from loftq_cli.checks.roundtrip import RoundTrip
    from loftq_cli.commands.loaded import choose, timed
    from loftq_cli.models.source import read_config, refuse_quantized
    from loftq_cli.models.spec import resolve_model
    from loftq_cli.schema import CheckResults

    # What cannot be checked at all is an error of its own, and comes before half a minute of work.
    with timed(run, "resolve"):
        found = resolve_model(model, with_code=trust_remote_code)
        config = read_config(found.directory)
        refuse_quantized(found.directory, config)
    with timed(run, "import"):
        where = choose(run, config, device, dtype)
        import bitsandbytes  # noqa: F401
        import peft  # noqa: F401

    subject = Subject(found.directory, where.device, where.dtype, trust_remote_code)
    with ExitStack() as files:
        planned = [
            *checks.hardware_checks(where.device),
            *checks.model_checks(subject),
            *checks.main_job_checks(RoundTrip(subject, files)),
        ]
        with run.timing("checks"), run.progress("checking", len(planned)) as progress:
            tests = run_checks(planned, progress, trace=run.listener.trace)
    run.finish(CheckResults(tests=tests, summary=summary(tests)), model=found.identity)
    failed = [test for test in tests if test.status == "failed"]
    if failed:
        names = ", ".join(test.name for test in failed)
        raise CheckFailed(
            f"{len(failed)} of {len(tests)} checks failed: {names}",
            cause=failed[0].cause,
            hint=failed[0].hint,
        )
