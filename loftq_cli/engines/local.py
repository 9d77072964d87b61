"""Runs the tasks of a plan one after the other in this process."""

from __future__ import annotations

from dataclasses import asdict

from loftq_cli.checkpoint.adapter import ADAPTER_NAME, adapter_part
from loftq_cli.checkpoint.safetensors import read_header
from loftq_cli.checkpoint.staging import Staging
from loftq_cli.engines.placement import InputMoments
from loftq_cli.engines.plan import Plan
from loftq_cli.engines.tasks import LayerOutcome, TaskResult, TaskSpec, run_task
from loftq_cli.record import Progress, Record


def run_tasks(
    plan: Plan,
    spec: TaskSpec,
    staging: Staging,
    record: Record,
    progress: Progress,
    input_moments: InputMoments | None = None,
) -> list[TaskResult]:
    """Makes every output file that an earlier run has not finished.

    Returns:
        the result of each task, in the plan's order; of files that were already there, what the
        manifest remembers.
    """
    if not all(_is_planned(name, plan, staging) for name in staging.finished):
        record.note("other versions of loftq or its libraries planned otherwise: starting over")
        staging.start_over()
    results: list[TaskResult] = []
    joined = ADAPTER_NAME in staging.finished
    for task in plan.tasks:
        done = staging.finished.get(task.file_name)
        if done is not None and (joined or adapter_part(task.file_name) in staging.finished):
            results.append(TaskResult([LayerOutcome(**fields) for fields in done.payload]))
            for planned in task.layers:
                progress.advance(planned.layer.module)
            continue
        result = run_task(task, spec, input_moments, progress)
        for tensor in result.on_cpu:
            record.warn(f"{tensor} does not fit on {spec.device}: computed on the CPU")
        record.add_timings(result.seconds)
        payload = [asdict(each) for each in result.outcomes]
        for name, file in result.files.items():
            staging.record(name, file, payload if name == task.file_name else None)
        results.append(result)
    return results


def _is_planned(name: str, plan: Plan, staging: Staging) -> bool:
    """Whether a finished file is one of the plan's, or none of a task's."""
    of_a_task = "/" not in name or name.startswith(adapter_part(""))
    if not of_a_task or not name.endswith(".safetensors"):
        return True
    found = read_header(staging.path(name)).tensors.values()
    for task in plan.tasks:
        files = {
            task.file_name: plan.model_tensors(task),
            adapter_part(task.file_name): plan.adapter_tensors(task.layers),
        }
        if name in files:
            wanted = {(each.name, each.dtype, each.shape) for each in files[name]}
            return wanted == {(each.name, each.dtype, each.shape) for each in found}
    return False
