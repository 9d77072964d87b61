"""Runs the tasks of a plan one after the other in this process, and commits the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from loftq_cli.checkpoint.adapter import ADAPTER_NAME, adapter_part
from loftq_cli.checkpoint.index import Checkpoint
from loftq_cli.checkpoint.staging import Staging
from loftq_cli.checkpoint.writer import write_safetensors
from loftq_cli.engines.estimates import Level
from loftq_cli.engines.pipeline import Timings, write_behind
from loftq_cli.engines.plan import Plan
from loftq_cli.engines.tasks import LayerOutcome, Moments, Progress, RunningTask


def run_tasks(
    plan: Plan,
    checkpoint: Checkpoint,
    staging: Staging,
    *,
    device: str,
    progress: Progress,
    timings: Timings,
    warn: Callable[[str], None],
    level: Level = Level.AHEAD,
    moments: Moments | None = None,
) -> list[LayerOutcome]:
    """Makes every output file that an earlier run has not finished.

    Returns:
        what came out for each layer, in the plan's order; of files that were already there, as
        the manifest remembers it.
    """
    outcomes: list[LayerOutcome] = []
    joined = ADAPTER_NAME in staging.finished
    for task in plan.tasks:
        part = adapter_part(task.file_name)
        done = staging.finished.get(task.file_name)
        if done is not None and (joined or part in staging.finished):
            outcomes += [LayerOutcome(**fields) for fields in done.payload]
            for planned in task.layers:
                progress.advance(planned.layer.module)
            continue
        running = RunningTask(
            task, plan.settings, checkpoint, device, progress, timings, warn, level, moments
        )
        model_file = write_behind(
            staging.path(task.file_name), plan.model_tensors(task), running.chunks(), timings
        )
        adapter_file = write_safetensors(
            staging.path(part), plan.adapter_tensors(task.layers), running.adapters
        )
        staging.record(part, adapter_file)
        staging.record(task.file_name, model_file, [asdict(each) for each in running.outcomes])
        outcomes += running.outcomes
    return outcomes
