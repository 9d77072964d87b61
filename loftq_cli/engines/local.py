"""Runs tasks one after the other in this process."""

from __future__ import annotations

from loftq_cli.engines.engine import Engine
from loftq_cli.engines.placement import InputMoments
from loftq_cli.engines.plan import Task
from loftq_cli.engines.tasks import TaskResult, TaskSpec, run_task
from loftq_cli.record import Progress


class InThisProcess(Engine):
    """One task at a time, each when its end is waited for; the only engine with moments."""

    slots = 1

    def __init__(self, spec: TaskSpec, input_moments: InputMoments | None = None) -> None:
        self._spec = spec
        self._input_moments = input_moments
        self._task: Task

    def submit(self, task: Task) -> None:
        self._task = task

    def wait(self, progress: Progress) -> tuple[Task, TaskResult]:
        return self._task, run_task(self._task, self._spec, self._input_moments, progress)
