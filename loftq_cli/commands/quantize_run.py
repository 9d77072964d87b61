"""One run of `quantize`: from a model to a complete directory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loftq_cli.commands.run import Run
from loftq_cli.errors import LoftqError

if TYPE_CHECKING:
    from loftq_cli.commands.quantize_result import Report
    from loftq_cli.engines.memory import MemoryPlan
    from loftq_cli.engines.plan import Plan
    from loftq_cli.engines.settings import Settings
    from loftq_cli.models.calibration import Calibration
    from loftq_cli.models.spec import ResolvedModel


def write_directory(
    run: Run,
    spec: str,
    output: Path,
    settings: Settings,
    *,
    device: str = "auto",
    calibration_text: Path | None = None,
    limit: int | None = None,
    resume: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
) -> tuple[Report, ResolvedModel, str]:
    """Writes the directory; the second and third are the source and the device that was used."""
    began = time.perf_counter()
    from loftq_cli import hardware
    from loftq_cli.checkpoint.index import open_checkpoint
    from loftq_cli.checkpoint.staging import Staging, refuse_existing
    from loftq_cli.checkpoint.writer import require_free_space
    from loftq_cli.commands import quantize_result as result
    from loftq_cli.engines import output as output_files
    from loftq_cli.engines.allocation import allocate
    from loftq_cli.engines.local import run_tasks
    from loftq_cli.engines.pipeline import Timings
    from loftq_cli.engines.plan import make_plan
    from loftq_cli.models.architecture import read_architecture
    from loftq_cli.models.source import (
        companions,
        read_config,
        refuse_quantized,
        tokenizer_files,
    )
    from loftq_cli.models.spec import resolve_model

    # Before a model is downloaded for nothing; `Staging` looks again when it holds the lock.
    if force:
        result.refuse_to_replace_foreign(output)
    elif not resume:
        refuse_existing(output, force)
    with run.timing("resolve"):
        found = resolve_model(spec, with_code=trust_remote_code)
        config = read_config(found.directory)
        refuse_quantized(found.directory, config)
        checkpoint = open_checkpoint(found.directory)
    with run.timing("plan"):
        run.quiet_libraries()
        chosen = hardware.resolve_device(device)
        if limit is not None and chosen.value != "cpu":
            chosen = hardware.Choice("cpu", "--max-memory counts memory of the CPU")
            run.warn("--max-memory counts memory of the CPU: the GPU is not used")
        run.resolved("device", *chosen)
        architecture = read_architecture(
            found.directory, config, trust_remote_code=trust_remote_code
        )
        tensors = [info for _, info in checkpoint.tensors.values()]
        if unused := architecture.require_weights(tensors):
            run.warn(
                f"{len(unused)} tensors belong to nothing in {architecture.class_name} and are "
                f"only copied, {unused[0]} among them"
            )
        plan = make_plan(architecture.inventory(tensors), settings)
        memory = plan_memory_for(run, plan, limit)
    seen_through = (
        tokenizer_files(found.directory, with_code=trust_remote_code)
        if settings.calibration
        else []
    )
    fingerprint = output_files.fingerprint(checkpoint, config, settings, chosen.value, seen_through)
    if resume and (document := result.finished_run(output, fingerprint)) is not None:
        run.note(f"{output} is already complete")
        return document, found, chosen.value

    with Staging(
        output, fingerprint=fingerprint, force=force, protected=[found.directory]
    ) as staging:
        kept = sum(entry.bytes for entry in staging.finished.values())
        if kept:
            run.note(f"going on with {staging.partial}: {len(staging.finished)} files are finished")

        def calibration() -> AbstractContextManager[Calibration | None]:
            return _calibration(
                run, found.directory, calibration_text, plan, chosen.value, limit, trust_remote_code
            )

        if settings.is_measured:
            with (
                calibration() as inputs,
                run.timing("measure"),
                run.progress("measuring", len(plan.layers)) as progress,
            ):
                plan = allocate(
                    plan,
                    checkpoint,
                    device=chosen.value,
                    progress=progress,
                    moments=None if inputs is None else inputs.moments,
                    order=() if inputs is None else inputs.order,
                )
        require_free_space(output, int(1.02 * (plan.model_bytes + 2 * plan.adapter_bytes)) - kept)
        timings = Timings()
        with (
            calibration() as inputs,
            run.timing("tasks"),
            run.progress("quantizing", len(plan.layers)) as progress,
        ):
            if inputs is not None:
                plan = plan.in_order(inputs.order)
            try:
                outcomes = run_tasks(
                    plan,
                    checkpoint,
                    staging,
                    device=chosen.value,
                    progress=progress,
                    timings=timings,
                    warn=run.warn,
                    level=memory.level,
                    moments=None if inputs is None else inputs.moments,
                )
            except BaseException as error:
                if not isinstance(error, Exception) and staging.finished:  # Ctrl-C or SIGTERM
                    finished = sum(task.file_name in staging.finished for task in plan.tasks)
                    run.note(
                        f"{finished} of {len(plan.tasks)} weight files are kept in "
                        f"{staging.partial}; run the same line again to go on"
                    )
                raise
        run.add_timings(timings.seconds)
        with run.timing("commit"):
            output_files.join_adapter(
                plan, checkpoint, staging, architecture, base_model=output.name
            )
            output_files.write_model_files(
                plan,
                staging,
                architecture,
                config,
                companions(found.directory, with_code=trust_remote_code),
            )
        document = run.document(
            result.results_of(
                plan,
                checkpoint,
                output=str(output),
                architecture=architecture.class_name,
                task_type=architecture.task_type,
                outcomes=outcomes,
                files=output_files.written_files(staging),
                fingerprint=result.digest(fingerprint),
                calibration=result.calibration_of(settings, inputs),
                seconds=time.perf_counter() - began,
                peak_memory_bytes=hardware.peak_memory_bytes(),
            ),
            model=result.identity_of(found),
        )
        result.write_document(staging, document)
        staging.commit()
    return document, found, chosen.value


@contextmanager
def _calibration(
    run: Run,
    directory: Path,
    text: Path | None,
    plan: Plan,
    device: str,
    limit: int | None,
    trust_remote_code: bool,
) -> Iterator[Calibration | None]:
    """The inputs of the plan's layers on the calibration text; None for starts without one."""
    from loftq_cli import hardware
    from loftq_cli.models.calibration import open_calibration
    from loftq_cli.report import units

    asked = plan.settings.calibration
    if text is None or asked is None:
        yield None
        return
    with open_calibration(
        directory,
        text,
        [planned.layer.module for planned in plan.layers],
        device=device,
        trust_remote_code=trust_remote_code,
        max_memory_bytes=limit or hardware.memory_bytes(),
        most_tokens=asked.tokens,
    ) as calibration:
        if calibration.text_sha256 != asked.sha256:
            raise LoftqError(
                f"{text} has changed since the run began", hint="run it again when it is complete"
            )
        widest = max(planned.layer.in_features for planned in plan.layers)
        if calibration.tokens < widest:
            run.warn(
                f"the calibration text has {calibration.tokens} tokens, fewer than the "
                f"{widest} inputs of the widest layer: more text would tell more"
            )
        yield calibration
        if calibration.unseen:
            run.warn(
                f"no token of the calibration text reached "
                f"{units.plural(len(calibration.unseen), 'layer')}, {min(calibration.unseen)} "
                "among them: there the errors of weights were what counted"
            )


def plan_memory_for(run: Run, plan: Plan, limit: int | None) -> MemoryPlan:
    """How much is held at once, by the same rule for a run and for a dry run."""
    from loftq_cli import hardware
    from loftq_cli.engines.estimates import Machine
    from loftq_cli.engines.memory import plan_memory

    memory = plan_memory(plan, limit, Machine(hardware.product_bytes(), hardware.threads()))
    run.resolved("memory_plan", memory.name, memory.reason)
    return memory
