"""Kills a run at each of its system calls in turn; started as a program by tests.

A process without threads, unlike pytest with torch in it, may fork: hundreds of deaths a second.
The run is that of `staged_run`, or an export or a merge, whose pickled plan is PLAN.

    python killed_at_each_call.py DIRECTORY [--force] [--export PLAN | --merge PLAN]
"""

from __future__ import annotations

import argparse
import gc
import os
import pickle
import shutil
import signal
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patched_os import TIDYING, WRITES, FaultyOs, death
from staged_run import contents, staged_run

from loftq_cli.checkpoint import staging, writer
from loftq_cli.errors import OutputExists

if TYPE_CHECKING:
    from loftq_cli.engines.export_plan import ExportPlan
    from loftq_cli.engines.merge_plan import MergePlan


class Subject(ABC):
    """What is killed."""

    @abstractmethod
    def write(self, output: Path, *, force: bool) -> None: ...

    @abstractmethod
    def write_former(self, output: Path) -> None:
        """Another directory, for --force to replace."""


class StagedRun(Subject):
    def write(self, output: Path, *, force: bool) -> None:
        staged_run(output, force=force)

    def write_former(self, output: Path) -> None:
        staged_run(output, seed=1)


class Rewriting(Subject):
    """A directory is written anew from another."""

    def __init__(self, plan: str) -> None:
        import torch

        torch.set_num_threads(1)  # a child that is forked has none of the others
        self.plan: Any = pickle.loads(Path(plan).read_bytes())

    def write_former(self, output: Path) -> None:
        shutil.copytree(self.plan.written.source, output)


class Export(Rewriting):
    plan: ExportPlan

    def write(self, output: Path, *, force: bool) -> None:
        from loftq_cli.engines.export import write_export
        from loftq_cli.record import Listener, Record

        os.chdir(output.parent)  # the report names its place
        write_export(self.plan, Path(output.name), Record("export", [], Listener()), force=force)


class Merge(Rewriting):
    plan: MergePlan

    def write(self, output: Path, *, force: bool) -> None:
        from loftq_cli.engines.merge import write_merged
        from loftq_cli.record import Listener, Record

        write_merged(self.plan, output, Record("merge", [], Listener()), force=force)


def run(subject: Subject, output: Path, faulty: FaultyOs, *, force: bool = False) -> None:
    writer.os = staging.os = faulty  # type: ignore[assignment]
    subject.write(output, force=force)


def die(subject: Subject, output: Path, position: int, force: bool) -> None:
    """A child process comes as far as this call, and no further."""
    child = os.fork()
    if child == 0:
        run(subject, output, FaultyOs(position, death, WRITES + TIDYING), force=force)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), position
    assert os.WTERMSIG(status) == signal.SIGKILL, position


def main(subject: Subject, directory: Path, force: bool) -> None:
    def prepared(name: str) -> Path:
        (directory / name).mkdir()
        output = directory / name / "OUT"
        if force:
            shutil.copytree(directory / "former", output)
        return output

    subject.write_former(directory / "former")
    run(subject, prepared("whole"), FaultyOs(), force=force)
    former, expected = contents(directory / "former"), contents(directory / "whole" / "OUT")
    assert former != expected

    gc.freeze()  # a child would copy all that is there, only to look whether it is still needed
    counting = FaultyOs(watched=WRITES + TIDYING)
    run(subject, prepared("counted"), counting, force=force)
    for position, name in enumerate(counting.calls):
        at = f"{name}, call {position}"
        output = prepared(str(position))
        die(subject, output, position, force)
        # With --force there is one moment without an OUT: between the two renames of the swap.
        swapping = (output.parent / "OUT.partial" / "replaced").exists()
        absent = not force or swapping
        found = contents(output) if output.exists() else None
        assert found == expected or (found is None and absent) or (force and found == former), at
        assert {entry.name for entry in output.parent.iterdir()} <= {"OUT", "OUT.partial"}, at
        try:
            run(subject, output, FaultyOs(), force=force)
        except OutputExists:
            assert not force, at
            assert found == expected, at
        assert contents(output) == expected, at
        assert [entry.name for entry in output.parent.iterdir()] == ["OUT"], at
    print(len(counting.calls), "deaths")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--export", type=Export, metavar="PLAN")
    parser.add_argument("--merge", type=Merge, metavar="PLAN")
    asked = parser.parse_args()
    main(asked.export or asked.merge or StagedRun(), asked.directory, asked.force)
