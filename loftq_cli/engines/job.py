"""The whole `quantize` run: from a model to a complete directory, or to what that would be."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from loftq_cli import hardware
from loftq_cli.checkpoint.adapter import ADAPTER_NAME
from loftq_cli.checkpoint.index import Checkpoint
from loftq_cli.checkpoint.staging import Staging
from loftq_cli.checkpoint.writer import require_free_space
from loftq_cli.engines import distilling, estimates, output
from loftq_cli.engines.allocation import allocate
from loftq_cli.engines.cluster import Cluster, connected
from loftq_cli.engines.engine import run_tasks
from loftq_cli.engines.expert_starts import target_parameters
from loftq_cli.engines.experts import tell_of_experts
from loftq_cli.engines.fingerprint import (
    base_identity,
    digest,
    fingerprint,
    require_unchanged,
    state,
)
from loftq_cli.engines.plan import NOT_A_TARGET, Plan, make_plan
from loftq_cli.engines.preflight import Asked, ask, ask_found
from loftq_cli.engines.report_file import (
    Report,
    finished_run,
    refuse_output,
    write_report,
)
from loftq_cli.engines.resources import choose_devices, engine_of, memory_plan
from loftq_cli.engines.results import calibrated_on, quantize_results
from loftq_cli.engines.sequence import layer_inputs, opened_calibration
from loftq_cli.engines.settings import Settings
from loftq_cli.engines.tasks import TaskResult, TaskSpec
from loftq_cli.formats import EngineName
from loftq_cli.libraries import importing
from loftq_cli.models.companions import Companions, companions
from loftq_cli.models.layers import linear_layers
from loftq_cli.models.lookup import find_model
from loftq_cli.models.source import read_config, refuse_quantized
from loftq_cli.models.spec import ResolvedModel, resolve_model, stream_model, streamable
from loftq_cli.record import Record
from loftq_cli.report import units
from loftq_cli.schema import CalibratedOn

if TYPE_CHECKING:
    from loftq_cli.models.architecture import Architecture
    from loftq_cli.models.calibration import Calibration


@dataclass(frozen=True)
class Job:
    """What a run is asked to do. ``memory_limit`` is in bytes, of the CPU's memory.

    Without a number of ``workers`` there is one for each device.
    """

    model: str
    output: Path
    settings: Settings
    device: str = "auto"
    calibration_text: Path | None = None
    engine: EngineName = "local"
    ray_address: str = "auto"
    workers: int | None = None
    memory_limit: int | None = None
    stream: bool = False  # the weights straight from the hub, none on this disk
    resume: bool = False
    force: bool = False
    trust_remote_code: bool = False


class Made(NamedTuple):
    """A complete directory's report, what it was made from, and on which device.

    ``on_cpu`` are the tensors that this run had to compute on the CPU instead.
    """

    document: Report
    source: ResolvedModel
    device: str
    on_cpu: list[str]


@dataclass(frozen=True)
class _Prepared:
    """All that is known before the first weight is read."""

    job: Job
    found: ResolvedModel
    config: dict[str, Any]
    checkpoint: Checkpoint
    architecture: Architecture
    devices: list[str]  # of each worker
    plan: Plan
    memory: estimates.MemoryPlan
    beside: Companions
    cluster: Cluster | None

    @property
    def device(self) -> str:
        """What this process computes on."""
        return self.devices[0]

    def fingerprint(self) -> dict[str, Any]:
        """What decides the bytes of the result (see `fingerprint.py`)."""
        seen_through = self.beside.tokenizer if self.job.settings.calibration else []
        return fingerprint(
            self.checkpoint, self.config, self.job.settings, self.device, seen_through
        )


def make_directory(job: Job, record: Record) -> Made:
    """Writes the directory, or finishes what an interrupted run left of it.

    Raises:
        LoftqError: whatever is wrong with the model, the settings or the disk.
    """
    began = time.perf_counter()
    # Before a model is downloaded for nothing.
    refuse_output(job.output, force=job.force, resume=job.resume)
    with ExitStack() as stack:
        cluster = None
        if job.engine == "ray":
            with record.timing("connect", "connecting to Ray"):
                cluster = stack.enter_context(connected(job.ray_address))
        return _make(_prepare(job, cluster, record), record, began)


def _make(ready: _Prepared, record: Record, began: float) -> Made:
    job = ready.job
    found, identity = ready.found, ready.fingerprint()
    if job.resume and (document := finished_run(job.output, identity)) is not None:
        record.note(f"{job.output} is already complete")
        return Made(document, found, ready.device, [])
    with Staging(
        job.output,
        fingerprint={**identity, "source_state": state(found, ready.checkpoint)},
        force=job.force,
        protected=[found.directory],
    ) as staging:
        output.tell_what_is_finished(staging, record)
        if job.settings.is_measured:
            ready = replace(ready, plan=_measured(ready, record))
        plan, done, calibration, workers_peak = _run_tasks(ready, staging, record)
        distilled = _distilled(ready, plan, staging, record)
        with record.timing("commit"):
            base = base_identity(identity, job.settings)
            output.join_adapter(
                plan,
                ready.checkpoint,
                staging,
                ready.architecture,
                base_model=job.output.name,
                base=base,
                device=ready.device,
                record=record,
                distilled=distilled,
            )
            output.write_model_files(plan, staging, ready.architecture, ready.config, ready.beside)
            require_unchanged(found, ready.checkpoint, identity)
        outcomes, distillation, expert_errors = distilling.told(
            job.settings,
            [outcome for result in done for outcome in result.outcomes],
            staging.finished[ADAPTER_NAME].payload,
        )
        results = quantize_results(
            plan,
            ready.checkpoint,
            output=str(job.output),
            **_described(ready.architecture),
            outcomes=outcomes,
            distillation=distillation,
            target_parameters=target_parameters(plan, ready.architecture),
            expert_errors=expert_errors,
            files=output.written_files(staging),
            not_copied=ready.beside.left_out,
            fingerprint=digest(identity),
            calibration=calibration,
            seconds=time.perf_counter() - began,
            peak_memory_bytes=hardware.peak_memory_bytes() + workers_peak,
        )
        document = write_report(staging, record.document(results, model=found.identity))
        staging.commit()
    return Made(document, found, ready.device, [name for each in done for name in each.on_cpu])


def foresee_directory(
    spec: str,
    settings: Settings,
    memory_limit: int | None,
    workers: int,
    record: Record,
    output: Path | None,
    *,
    preflight: bool,
    stream: bool,
    trust_remote_code: bool,
) -> Report:
    """What a run would give, estimated. Reads headers and config only, whether it is to ``stream``
    the weights or not.

    Without ``preflight`` what is a layer is told by names and shapes, and no torch is imported;
    with it the model class, its loader and PEFT are asked as a run asks them.
    """
    if stream:
        streamable(spec)
    found = find_model(spec, record.note, with_headers=True)
    record.resolved("model", found.identity.source, found.reason)
    assert found.checkpoint is not None
    assert found.config is not None
    checkpoint = found.checkpoint.cast(settings.dtype)
    described: dict[str, Any]
    if preflight:
        with record.timing("plan"):
            asked = ask_found(found, settings, trust_remote_code=trust_remote_code)
        _tell(asked, record)
        plan, checkpoint, architecture, _ = asked
        described = _described(architecture)
    else:
        plan = make_plan(linear_layers(checkpoint.infos, found.config), settings)
        described = {"architecture": found.outline.architecture, "counted_by": "names"}
    memory = memory_plan(plan, memory_limit, workers, record)
    tell_of_experts(plan, checkpoint, record)
    results = quantize_results(
        plan,
        checkpoint,
        output="" if output is None else str(output),
        **described,
        seconds=estimates.seconds(plan),
        peak_memory_bytes=memory.peak_bytes,
    )
    return record.document(results, model=found.identity)


def _described(architecture: Architecture) -> dict[str, Any]:
    """What the results say of the model class."""
    return {
        "architecture": architecture.class_name,
        "auto_class": architecture.auto_class,
        "own_code": architecture.own_code,
        "task_type": architecture.task_type,
    }


def _prepare(job: Job, cluster: Cluster | None, record: Record) -> _Prepared:
    """Finds the model and plans the run."""
    with record.timing("resolve"):
        find = stream_model if job.stream else resolve_model
        found = find(job.model, with_code=job.trust_remote_code)
        config = read_config(found.directory)
        refuse_quantized(found.directory, config)
        if cluster is not None:  # a node's processes work elsewhere
            found = replace(found, directory=found.directory.absolute())
        checkpoint = found.checkpoint().cast(job.settings.dtype)
        _tell_of_stream(found, checkpoint, record)
    with record.timing("plan"), importing():
        devices = choose_devices(job, cluster, record)
        asked = ask(
            found.directory,
            config,
            checkpoint,
            job.settings,
            trust_remote_code=job.trust_remote_code,
        )
        _tell(asked, record)
        plan, checkpoint, architecture, _ = asked
        tell_of_experts(plan, checkpoint, record)
        # More processes than tasks would have nothing to do. Calibrated layers are tasks each.
        devices = devices[: len(plan.layers if job.settings.calibration else plan.tasks)]
        memory = memory_plan(plan, job.memory_limit, len(devices), record, devices[0])
    beside = _beside(job, found, checkpoint, record)
    return _Prepared(
        job, found, config, checkpoint, architecture, devices, plan, memory, beside, cluster
    )


def _tell_of_stream(found: ResolvedModel, checkpoint: Checkpoint, record: Record) -> None:
    if found.streamed is not None:
        record.note(
            f"{units.size(checkpoint.total_bytes)} of weights are read from the hub as they are "
            f"needed, at commit {found.identity.revision}; none are kept on this disk"
        )


def _beside(job: Job, found: ResolvedModel, checkpoint: Checkpoint, record: Record) -> Companions:
    """The files that go with the weights; it is said where some that may be needed do not."""
    beside = companions(
        found.directory,
        with_code=job.trust_remote_code,
        weights=checkpoint.headers,
        not_fetched=found.not_fetched,
    )
    if missed := beside.missed:
        first = ", ".join(f"{each.name} ({each.reason})" for each in missed[:3])
        more = f" and {len(missed) - 3} more" if len(missed) > 3 else ""
        record.warn(
            f"not copied: {first}{more}; not_copied in the report lists all that was left out"
        )
    return beside


def _tell(asked: Asked, record: Record) -> None:
    """What someone who expected otherwise should hear before the run."""
    if unused := asked.unused:
        record.warn(
            f"{len(unused)} tensors belong to nothing in {asked.architecture.class_name} and are "
            f"only copied, {unused[0]} among them"
        )
    reasons = Counter(each.reason for each in asked.plan.layers if not each.layer.expert)
    for reason, count in reasons.items():
        if reason not in ("", NOT_A_TARGET):
            record.warn(f"no adapter on {units.plural(count, 'layer')}: {reason}")


def _measured(ready: _Prepared, record: Record) -> Plan:
    """The plan with the bits and ranks that follow from what the layers lose."""
    plan = ready.plan
    with (
        _calibration(ready, record) as inputs,
        record.timing("measure"),
        record.progress("measuring", len(plan.layers)) as progress,
    ):
        return allocate(
            plan, ready.checkpoint, device=ready.device, progress=progress, inputs=inputs
        )


def _run_tasks(
    ready: _Prepared, staging: Staging, record: Record
) -> tuple[Plan, list[TaskResult], CalibratedOn | None, int]:
    """All tasks, in the order in which their inputs are known; the plan has that order then.

    The last of what it gives are the bytes that other processes held for it.
    """
    plan, settings = ready.plan, ready.job.settings
    kept = sum(entry.bytes for entry in staging.finished.values())
    needed = int(1.02 * (plan.model_bytes + 2 * plan.adapter_bytes)) + ready.beside.bytes - kept
    require_free_space(ready.job.output, needed)
    spec = TaskSpec(settings, ready.checkpoint, staging.directory, ready.device, ready.memory.ahead)
    with (
        _calibration(ready, record) as calibration,
        record.timing("tasks"),
        record.progress("quantizing", len(plan.layers)) as progress,
    ):
        inputs = None
        if calibration is not None:
            plan, inputs = layer_inputs(calibration, plan, spec.output, spec.device, record)
        engine = engine_of(spec, plan, ready.devices, ready.memory, ready.cluster, inputs, record)
        with output.telling_what_is_kept(staging, [task.file_name for task in plan.tasks], record):
            done = run_tasks(plan, engine, staging, record, progress)
    calibrated = None if calibration is None else calibrated_on(calibration)
    return plan, done, calibrated, engine.peak_memory_bytes


def _distilled(
    ready: _Prepared, plan: Plan, staging: Staging, record: Record
) -> distilling.Distilled | None:
    """The adapters after a training on the calibration text; None without one, or if it is done."""
    text = ready.job.calibration_text
    done = ADAPTER_NAME in staging.finished
    if text is None or plan.settings.distill_steps is None or done:
        return None
    with output.telling_what_is_kept(staging, [task.file_name for task in plan.tasks], record):
        return distilling.distill_adapters(
            plan,
            ready.checkpoint,
            ready.architecture,
            ready.found.directory,
            staging.directory,
            text,
            device=ready.device,
            trust_remote_code=ready.job.trust_remote_code,
            record=record,
        )


def _calibration(ready: _Prepared, record: Record) -> AbstractContextManager[Calibration | None]:
    """The inputs of the plan's layers on the calibration text; None for starts without one."""
    job = ready.job
    if job.calibration_text is None:
        return nullcontext()
    return opened_calibration(
        ready.plan,
        ready.found.directory,
        job.calibration_text,
        device=ready.device,
        trust_remote_code=job.trust_remote_code,
        max_memory_bytes=job.memory_limit or hardware.memory_bytes(),
        record=record,
    )
