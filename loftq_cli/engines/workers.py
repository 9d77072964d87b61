"""Runs tasks in processes beside this one, on as many devices as there are.

A worker is given one task at a time and says through its pipe what becomes of it. It knows nothing
of the manifest, and ends when this process does.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import TracebackType

from loftq_cli import hardware
from loftq_cli.engines.engine import Engine, Lost
from loftq_cli.engines.plan import Task
from loftq_cli.engines.tasks import TaskResult, TaskSpec, run_task
from loftq_cli.errors import LoftqError, UsageError, first_line
from loftq_cli.libraries import quiet_libraries
from loftq_cli.record import Progress

# Spawned, not forked: what CUDA and OpenMP hold does not survive a fork.
_SPAWN = get_context("spawn")
# How long a process that was killed may take to be gone.
_PATIENCE_SECONDS = 30.0


def deal_out(devices: Sequence[str], workers: int | None) -> list[str]:
    """The device of each worker: without a number of ``workers`` one for each device.

    Raises:
        UsageError: there are fewer than devices.
    """
    count = len(devices) if workers is None else workers
    if count < len(devices):
        raise UsageError(
            f"--workers {count} leaves some of the {len(devices)} GPUs without work",
            hint=f"--device {','.join(devices[:count])}, or leave --workers out",
        )
    return [devices[number % len(devices)] for number in range(count)]


@dataclass(frozen=True)
class Threads:
    """Of each worker: its ``share`` for the work itself, torch's number for what follows that."""

    torch: int
    share: int

    @classmethod
    def of_each(cls, workers: int) -> Threads:
        import torch

        threads = torch.get_num_threads()
        return cls(threads, max(1, threads // workers))

    def take(self) -> None:
        """In the worker: from now on it keeps to them."""
        import torch

        from loftq_cli.core.parallel import use_at_most

        torch.set_num_threads(self.torch)
        use_at_most(self.share)


@dataclass
class _Worker:
    number: int
    process: SpawnProcess
    pipe: Connection
    task: Task | None = None
    peak_memory_bytes: int = 0


class Workers(Engine):
    """A process for each of ``devices``, which may repeat; each is started when it has a task."""

    def __init__(self, spec: TaskSpec, devices: Sequence[str]) -> None:
        self._spec = spec
        self._devices = devices
        self._threads = Threads.of_each(len(devices))
        self._workers: dict[int, _Worker] = {}
        self._peak_of_ended = 0

    @property
    def slots(self) -> int:
        return len(self._devices)

    @property
    def peak_memory_bytes(self) -> int:
        return self._peak_of_ended

    def submit(self, task: Task) -> None:
        idle = (each for each in self._workers.values() if each.task is None)
        worker = next(idle, None) or self._start()
        worker.task = task
        with suppress(OSError):  # it has ended: `wait` finds that
            worker.pipe.send(task)

    def wait(self, progress: Progress) -> tuple[Task, TaskResult | Lost]:
        while True:
            busy = {each.pipe: each for each in self._workers.values() if each.task is not None}
            for pipe in connection.wait(list(busy)):
                end = self._hear(busy[pipe], progress)  # type: ignore[index]
                if end is not None:
                    return end

    def _hear(self, worker: _Worker, progress: Progress) -> tuple[Task, TaskResult | Lost] | None:
        """One message of a worker; its task and what became of it, if that was the last."""
        assert worker.task is not None
        try:
            said, value = worker.pipe.recv()
        except (EOFError, OSError):
            return worker.task, self._lost(worker)
        if said in ("start", "advance"):
            getattr(progress, said)(value)
            return None
        if said == "failed":
            raise value
        task, worker.task = worker.task, None
        result, worker.peak_memory_bytes = value
        return task, result

    def _start(self) -> _Worker:
        number = min(set(range(len(self._devices))) - self._workers.keys())
        ours, theirs = _SPAWN.Pipe()
        spec = replace(self._spec, device=self._devices[number])
        process = _SPAWN.Process(
            target=_serve,
            args=(theirs, spec, self._threads),
            name=f"loftq worker {number + 1}",
            daemon=True,
        )
        with _deaf_to_ctrl_c():
            process.start()
        theirs.close()  # so that the pipe ends with the process
        worker = self._workers[number] = _Worker(number, process, ours)
        return worker

    def _lost(self, worker: _Worker) -> Lost:
        self._end(worker)
        code = worker.process.exitcode or 0
        cause = f"exit code {code}"
        if code < 0:
            cause = f"killed by {signal.Signals(-code).name}"
            cause += ", as the system does where memory runs out" * (code == -signal.SIGKILL)
        return Lost(worker.process.name.removeprefix("loftq "), cause)

    def _end(self, worker: _Worker) -> None:
        """Lets go of a worker that has ended, or waits until it has."""
        worker.process.join(_PATIENCE_SECONDS)
        worker.pipe.close()
        del self._workers[worker.number]
        self._peak_of_ended += worker.peak_memory_bytes

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        workers = list(self._workers.values())
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            self._end(worker)


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """A process that is started within never gets SIGINT, which a terminal sends to all.

    It is this one that decides what becomes of the run.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- in the worker --------------------------------------------------------------------------------


class _ToldThere(Progress):
    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def start(self, name: str) -> None:
        self._pipe.send(("start", name))

    def advance(self, name: str = "") -> None:
        self._pipe.send(("advance", name))


def _serve(pipe: Connection, spec: TaskSpec, threads: Threads) -> None:
    """All that a worker does: a task after the other, until there is nobody who gives it one."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet_libraries()
    threads.take()
    told = _ToldThere(pipe)
    with suppress(EOFError):
        while True:
            task = pipe.recv()
            try:
                result = run_task(task, spec, progress=told)
            except Exception as error:
                pipe.send(("failed", portable(error)))
            else:
                pipe.send(("done", (result, hardware.peak_memory_bytes())))


def _end_with_parent() -> None:
    """A run that is killed leaves nothing behind that still writes into its directory."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def portable(error: Exception) -> Exception:
    """The error, if it arrives in another process as what it is; else what it says."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return LoftqError(f"unexpected {first_line(error)}")
    return error
