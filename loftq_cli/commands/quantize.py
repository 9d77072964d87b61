"""`loftq quantize`: a checkpoint becomes a packed backbone with its LoftQ adapter."""

from __future__ import annotations

from typing import Literal

from loftq_cli.asked import QuantizeOptions, size
from loftq_cli.commands.options import option
from loftq_cli.commands.run import Run, command
from loftq_cli.errors import UsageError


@command(
    "quantize",
    dtype=option(
        Literal["auto", "float32", "bfloat16", "float16"],
        "--dtype",
        metavar="auto|float32|bfloat16|float16",
        help="What all that is not quantized is written and computed in; auto keeps the "
        "checkpoint's. float16 is for cards without bfloat16 (T4, V100, RTX 20).",
    ),
)
def quantize(run: Run, asked: QuantizeOptions) -> None:
    """
    \b
    loftq quantize --model org/name --output OUT
    loftq quantize --output OUT                      (the built-in model)
    loftq quantize --model org/name --dry-run --json | jq .results.totals

    Writes a packed 4-bit backbone and a LoRA adapter that starts where the two together are
    closest to the original: a directory that plain transformers and peft load.
    """
    if asked.output is None and not asked.dry_run:
        raise UsageError("nowhere to write", hint="add --output DIR, or --dry-run")
    if asked.force and asked.resume:
        raise UsageError("--force replaces the output, --resume accepts it: choose one")
    if asked.verify and asked.dry_run:
        raise UsageError("--dry-run writes nothing that --verify could open: choose one")
    limit = None
    if asked.max_memory is not None:
        limit = size(asked.max_memory, "--max-memory", plain_bytes=True)
        if asked.device not in ("auto", "cpu"):
            raise UsageError(
                f"--max-memory counts memory of the CPU: not with --device {asked.device}",
                hint="--device cpu",
            )
    from loftq_cli.engines.job import Job, foresee_directory, make_directory
    from loftq_cli.engines.settings import settings_of

    settings = settings_of(asked)
    if settings.container.warning is not None:
        run.warn(settings.container.warning)
    if asked.dry_run:
        run.emit(foresee_directory(asked.model, settings, limit, run, asked.output))
        return
    assert asked.output is not None
    job = Job(
        model=asked.model,
        output=asked.output,
        settings=settings,
        device=asked.device,
        calibration_text=asked.calibration_text,
        memory_limit=limit,
        resume=asked.resume,
        force=asked.force,
        trust_remote_code=asked.trust_remote_code,
    )
    made = make_directory(job, run)
    if not asked.verify:
        run.emit(made.document)
        return
    from loftq_cli.checks.written.certify import certify, require_passed

    certificate = certify(
        run,
        asked.output,
        made.document,
        made.source,
        device=made.device,
        trust_remote_code=asked.trust_remote_code,
    )
    passed = [test.name for test in certificate.tests if test.status == "passed"]
    run.note(f"verified: {', '.join(passed) or 'nothing'}")
    for test in certificate.tests:
        if test.status == "skipped":
            run.note(f"verify: {test.name} {test.detail}")
    run.emit(made.document)
    require_passed(certificate)
