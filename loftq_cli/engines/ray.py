"""Runs tasks on a Ray cluster, one Ray task each.

Ray chooses the node, by what a task says that it takes. A task writes into the directory that all
nodes share, always the same bytes, so one whose node was lost is simply begun again. What it gives
comes back to this process, which alone knows the manifest.
"""

from __future__ import annotations

from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from loftq_cli import hardware
from loftq_cli.engines.cluster import Cluster, Need, Sight
from loftq_cli.engines.engine import Engine, Lost
from loftq_cli.engines.plan import Task
from loftq_cli.engines.tasks import TaskResult, TaskSpec, run_task
from loftq_cli.engines.workers import Threads, portable
from loftq_cli.errors import LoftqError, first_line
from loftq_cli.record import Progress, Record

if TYPE_CHECKING:
    from pathlib import Path

# Between two looks at whether Ctrl-C has arrived.
_LOOK_SECONDS = 0.5


class _Done(NamedTuple):
    """What comes back from a node."""

    node: str
    process: int
    peak_memory_bytes: int
    end: TaskResult | Exception


class OnRay(Engine):
    """As many tasks at once as the cluster has room for, and one that waits for room to come."""

    def __init__(self, cluster: Cluster, spec: TaskSpec, need: Need, record: Record) -> None:
        self._cluster = cluster
        self._spec = spec
        self._need = need
        self._record = record
        self._flying: dict[Any, Task] = {}
        self._peaks: dict[tuple[str, int], int] = {}
        self._mark: Path | None = None
        self._run: Any = None

    def __enter__(self) -> OnRay:
        import ray
        import torch

        sight = self._cluster.require_sight(self._spec.checkpoint, self._spec.output)
        self._mark = sight.mark
        kinds = sorted(set(self._cluster.processors.values()))
        if len(kinds) > 1 and self._spec.device == "cpu":
            self._record.warn(
                f"the nodes' processors differ ({'; '.join(kinds)}): the last bits of a file "
                "depend on the node that makes it"
            )
        remote = ray.remote(
            num_cpus=self._need.cpus,
            num_gpus=self._need.gpus,
            memory=self._need.memory_bytes,
            max_retries=0,  # a task that is lost is begun again by `engine.run_tasks`
        )(_run)
        common = ray.put((self._spec, Threads(torch.get_num_threads(), self._need.cpus), sight))
        self._run = lambda task: remote.remote(task, common)
        return self

    @property
    def slots(self) -> int:
        return sum(node.tasks(self._need) for node in self._cluster.nodes()) + 1

    @property
    def peak_memory_bytes(self) -> int:
        return sum(self._peaks.values())

    def submit(self, task: Task) -> None:
        self._flying[self._run(task)] = task

    def wait(self, progress: Progress) -> tuple[Task, TaskResult | Lost]:
        import ray
        from ray.exceptions import RayError, RayTaskError

        ready: list[Any] = []
        while not ready:
            ready, _ = ray.wait(list(self._flying), num_returns=1, timeout=_LOOK_SECONDS)
        task = self._flying.pop(ready[0])
        try:
            done: _Done = ray.get(ready[0])
        except RayTaskError as error:
            raise LoftqError(
                f"{task.file_name} could not be begun", cause=str(error).strip().splitlines()[-1]
            ) from error
        except RayError as error:
            return task, Lost("a process of Ray", first_line(error))
        if isinstance(done.end, LoftqError):
            raise done.end.within(f"node {self._name(done.node)}")
        if isinstance(done.end, Exception):
            raise done.end
        self._peaks[done.node, done.process] = done.peak_memory_bytes
        return task, done.end

    def _name(self, node: str) -> str:
        names = {each.id: each.name for each in self._cluster.nodes()}
        return names.get(node, node)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        import ray

        for reference in self._flying:
            ray.cancel(reference, force=True)
        if self._mark is not None:
            self._mark.unlink(missing_ok=True)


# --- on a node ------------------------------------------------------------------------------------


def _run(task: Task, common: tuple[TaskSpec, Threads, Sight]) -> _Done:
    import os

    import ray

    spec, threads, sight = common
    end: TaskResult | Exception
    try:
        _begin(threads, sight)
        end = run_task(task, spec)
    except Exception as error:
        end = portable(error)
    node = ray.get_runtime_context().get_node_id()
    return _Done(node, os.getpid(), hardware.peak_memory_bytes(), end)


@cache
def _begin(threads: Threads, sight: Sight) -> None:
    """Once in a process; of a node that has joined since the run began, the first look at it."""
    threads.take()
    sight.require()
