"""`loftq check`: what a new box, or a new model on it, has to show before work begins."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from loftq_cli.commands.run import Run, command
from loftq_cli.errors import CheckFailed

if TYPE_CHECKING:
    from loftq_cli.checks.battery import Check, Outcome
    from loftq_cli.checks.model import Subject
    from loftq_cli.checks.roundtrip import RoundTrip
    from loftq_cli.schema import CheckResults


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
    from loftq_cli.checks.battery import run_checks
    from loftq_cli.checks.model import Subject
    from loftq_cli.checks.roundtrip import RoundTrip
    from loftq_cli.commands.loaded import choose, timed
    from loftq_cli.models.source import read_config, refuse_quantized
    from loftq_cli.models.spec import resolve_model

    # What cannot be checked at all is an error of its own, and comes before half a minute of work.
    with timed(run, "resolve"):
        found = resolve_model(model, with_code=trust_remote_code)
        refuse_quantized(found.directory, read_config(found.directory))
    where = choose(run, found.directory, device, dtype)
    with timed(run, "import"):
        import bitsandbytes  # noqa: F401
        import peft  # noqa: F401

    began = time.perf_counter()
    subject = Subject(found.directory, where.device, where.dtype, trust_remote_code)
    with ExitStack() as files:
        checks = [*_hardware(where.device), *_model(subject), *_round(RoundTrip(subject, files))]
        with run.timing("checks"), run.progress("checking", len(checks)) as progress:
            outcomes = run_checks(checks, progress, trace=run.listener.trace)
    results = _results(outcomes, time.perf_counter() - began)
    run.finish(results, model=found.identity)
    failed = [test for test in results.tests if test.status == "failed"]
    if failed:
        names = ", ".join(test.name for test in failed)
        raise CheckFailed(
            f"{len(failed)} of {len(results.tests)} checks failed: {names}",
            cause=failed[0].cause,
            hint=failed[0].hint,
        )


def _hardware(device: str) -> list[Check]:
    from loftq_cli.checks import kernels, layers, rates
    from loftq_cli.checks.battery import Check

    group = "hardware"
    return [
        Check(name, group, verifies, partial(body, device))
        for name, verifies, body in (
            (
                "4-bit quantization",
                "codes and scales of every level, border and block edge equal the reference",
                kernels.quantization,
            ),
            (
                "4-bit dequantization",
                "all codes, scales and formats are read as the reference reads them",
                kernels.dequantization,
            ),
            (
                "4-bit layer",
                "its products, forwards and backwards, are those of the dequantized weight",
                layers.four_bit,
            ),
            (
                "int8 kernel",
                "codes, scales and values equal the reference",
                layers.int8,
            ),
            (
                "compiled loops",
                "loftq's own fast loops give the reference's codes, scales and residuals",
                kernels.compiled,
            ),
            (
                "half precision",
                "products in bfloat16 and float16 are right against float64",
                rates.half_precision,
            ),
            (
                "matrix products",
                "products run in every dtype, and how many of them a second",
                rates.matrix_products,
            ),
            ("memory bandwidth", "a large copy arrives whole", rates.memory_bandwidth),
            (
                "SVD",
                "factors are orthonormal, and what they leave is what theory says",
                rates.decomposition,
            ),
        )
    ]


def _model(subject: Subject) -> Iterable[Check]:
    from loftq_cli.checks import model
    from loftq_cli.checks.battery import Check

    group = "model"
    yield Check(
        "load",
        group,
        "weights and tokenizer load, no parameter is missing, NaN or infinite",
        partial(model.load, subject),
    )
    for rank in model.RANKS:
        yield Check(
            f"rank {rank}",
            group,
            "trainable parameters counted from the files equal PEFT's on a fresh model",
            partial(model.rank, subject, rank),
        )
    yield Check(
        "generation",
        group,
        "text is written, and a new adapter does not change it",
        partial(model.generation, subject),
        needs=("load",),
    )
    yield Check(
        "efficiency",
        group,
        "share, reduction and size of the adapter at each rank",
        partial(model.efficiency, subject),
    )
    for name in model.TARGETS:
        yield Check(
            f"targets {name}",
            group,
            "the names of this preset choose the layers that it counts",
            partial(model.targets, subject, name),
        )


def _round(trip: RoundTrip) -> list[Check]:
    from loftq_cli.checks.battery import Check

    return [
        Check(
            "quantize",
            "main job",
            "every layer is written in 4 bits, and its adapter takes error away",
            trip.quantize,
        ),
        Check(
            "reload",
            "main job",
            "bitsandbytes and PEFT make of the files what was measured",
            trip.reload,
            needs=("quantize",),
        ),
    ]


def _results(outcomes: list[Outcome], seconds: float) -> CheckResults:
    from loftq_cli.schema import CheckResults, CheckSummary, CheckTest

    tests = [
        CheckTest(
            name=each.check.name,
            group=each.check.group,
            status=each.status,
            seconds=each.seconds,
            verified=each.check.verifies,
            detail=each.finding.detail,
            figures=each.finding.figures,
            rows=list(each.finding.rows),
            cause=each.cause,
            hint=each.hint,
        )
        for each in outcomes
    ]
    count = {
        status: sum(test.status == status for test in tests)
        for status in ("passed", "failed", "skipped")
    }
    return CheckResults(
        tests=tests, summary=CheckSummary(total=len(tests), seconds=seconds, **count)
    )
