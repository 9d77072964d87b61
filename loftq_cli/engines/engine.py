"""Runs the tasks of a plan on an engine, and keeps what comes of them.

An engine is where tasks run: in this process (`local.py`), in others beside it (`workers.py`), on a
cluster (`ray.py`). It begins what it is given and says what has ended. All else is here, once:
what is left to do, how much of it at a time, the manifest, and what a lost process costs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from loftq_cli.checkpoint.adapter import ADAPTER_NAME, adapter_part
from loftq_cli.checkpoint.safetensors import read_header
from loftq_cli.checkpoint.staging import Staging
from loftq_cli.checkpoint.writer import discard_unfinished, free_bytes
from loftq_cli.engines.plan import Plan, Task
from loftq_cli.engines.tasks import LayerOutcome, TaskResult
from loftq_cli.errors import LoftqError
from loftq_cli.record import Progress, Record


class Lost(NamedTuple):
    """Instead of a result: the process that ``where`` names ended before its task did."""

    where: str
    cause: str


class Engine:
    """Where tasks run. `with engine:` holds what it needs for that, and ends what still runs."""

    @property
    def slots(self) -> int:
        """As many tasks may be under way now."""
        raise NotImplementedError

    @property
    def peak_memory_bytes(self) -> int:
        """The most that processes other than this one have held, all of them together."""
        return 0

    def submit(self, task: Task) -> None:
        """Begins a task."""
        raise NotImplementedError

    def wait(self, progress: Progress) -> tuple[Task, TaskResult | Lost]:
        """A task that has ended.

        Raises:
            LoftqError: as `run_task`, where one failed.
        """
        raise NotImplementedError

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass


def run_tasks(
    plan: Plan, engine: Engine, staging: Staging, record: Record, progress: Progress
) -> list[TaskResult]:
    """Makes every output file that an earlier run has not finished.

    Returns:
        the result of each task, in the plan's order; of files that were already there, what the
        manifest remembers.

    Raises:
        LoftqError: a task failed, or took two processes with it.
    """
    if not all(_is_planned(name, plan, staging) for name in staging.finished):
        record.note("other versions of loftq or its libraries planned otherwise: starting over")
        staging.start_over()
    elif _is_behind(plan, staging):
        record.note("the adapters are distilled, and files before that are lost: starting over")
        staging.start_over()
    results: dict[str, TaskResult] = {}
    told = _Once(progress)
    waiting: deque[Task] = deque()
    joined = ADAPTER_NAME in staging.finished
    for task in plan.tasks:
        done = staging.finished.get(task.file_name)
        if done is not None and (joined or adapter_part(task.file_name) in staging.finished):
            results[task.file_name] = TaskResult([LayerOutcome(**each) for each in done.payload])
            told.all_of(task)
        else:
            waiting.append(task)
    if waiting:
        with engine:
            _run(waiting, plan, engine, staging, record, told, results)
    return [results[task.file_name] for task in plan.tasks]


def _run(
    waiting: deque[Task],
    plan: Plan,
    engine: Engine,
    staging: Staging,
    record: Record,
    told: _Once,
    results: dict[str, TaskResult],
) -> None:
    """Adds the results of the tasks that wait, each recorded as soon as it is there."""

    def has_room(tasks: list[Task]) -> bool:
        return _has_room(plan, tasks, staging)

    for task, result in finished(waiting, engine, staging.directory, record, told, has_room):
        for tensor in result.on_cpu:
            record.warn(f"{tensor} does not fit on {result.device}: computed on the CPU")
        record.add_timings(result.seconds)
        payload = [asdict(each) for each in result.outcomes]
        for name, file in result.files.items():
            staging.record(name, file, payload if name == task.file_name else None)
        told.all_of(task)
        results[task.file_name] = result


def finished(
    tasks: Iterable[Task],
    engine: Engine,
    directory: Path,
    record: Record,
    progress: Progress,
    has_room: Callable[[list[Task]], bool] = lambda tasks: True,
) -> Iterator[tuple[Task, TaskResult]]:
    """Runs tasks that write into ``directory``, each begun again once where its process is lost.

    Args:
        has_room: whether the first of these may be begun beside the others.

    Raises:
        LoftqError: a task failed, or took two processes with it.
    """
    waiting, flying, lost = deque(tasks), dict[str, Task](), set[str]()
    while waiting or flying:
        while waiting and len(flying) < engine.slots and has_room([waiting[0], *flying.values()]):
            task = waiting.popleft()
            flying[task.file_name] = task
            engine.submit(task)
        task, end = engine.wait(progress)
        del flying[task.file_name]
        if not isinstance(end, Lost):
            yield task, end
            continue
        for name in _files_of(task):
            discard_unfinished(directory / name)
        if task.file_name in lost:
            raise LoftqError(
                f"two processes in turn ended while they made {task.file_name}",
                cause=f"the last: {end.where}, {end.cause}",
                hint="the same line goes on with what is finished; with less memory free than "
                "the run takes, fewer at once may do",
            )
        lost.add(task.file_name)
        record.note(f"{end.where} ended, {end.cause}: {task.file_name} is made again")
        waiting.appendleft(task)


class _Once(Progress):
    """Tells of every layer once, also where its task is begun again."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._done: set[str] = set()

    def start(self, name: str) -> None:
        if name not in self._done:
            self._progress.start(name)

    def advance(self, name: str = "") -> None:
        if name not in self._done:
            self._done.add(name)
            self._progress.advance(name)

    def all_of(self, task: Task) -> None:
        """The task is done, whether or not it was heard of its layers."""
        for planned in task.layers:
            self.advance(planned.layer.module)


def _has_room(plan: Plan, tasks: list[Task], staging: Staging) -> bool:
    """Whether the disk has room for the first of the tasks beside those that are under way.

    One that would be alone is begun all the same: its own error says what is missing.
    """
    needed = sum(
        tensor.nbytes
        for task in tasks
        for tensor in [*plan.model_tensors(task), *plan.adapter_tensors(task.layers)]
    )
    return len(tasks) == 1 or needed <= free_bytes(staging.directory)


def _is_behind(plan: Plan, staging: Staging) -> bool:
    """Whether layers are to be made after which there are only adapters that were trained since."""
    missing = any(task.file_name not in staging.finished for task in plan.tasks)
    trained = plan.settings.distill_steps is not None and ADAPTER_NAME in staging.finished
    return trained and missing


def _files_of(task: Task) -> Iterable[str]:
    return task.file_name, adapter_part(task.file_name)


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
