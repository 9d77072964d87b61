"""Runs tasks one after the other in this process."""

from __future__ import annotations

from loftq_cli.engines.engine import Engine
from loftq_cli.engines.plan import Task
from loftq_cli.engines.sequence import LayerInputs
from loftq_cli.engines.tasks import TaskResult, TaskSpec, run_task
from loftq_cli.record import Progress


class InThisProcess(Engine):
    """One task at a time, each when its end is waited for; the only engine with inputs."""

    slots = 1

    def __init__(self, spec: TaskSpec, inputs: LayerInputs | None = None) -> None:
        self._spec = spec
        self._inputs = inputs
        self._task: Task

    def submit(self, task: Task) -> None:
        self._task = task

    def wait(self, progress: Progress) -> tuple[Task, TaskResult]:
        return self._task, run_task(self._task, self._spec, self._inputs, progress)
