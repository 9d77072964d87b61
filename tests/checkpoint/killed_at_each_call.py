"""Kills a run at each of its system calls in turn; started as a program by test_kill.

A process without threads, unlike pytest with torch in it, may fork: hundreds of deaths a second.

    python killed_at_each_call.py DIRECTORY [--force]
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

from patched_os import TIDYING, WRITES, FaultyOs, death
from staged_run import contents, staged_run

from loftq_cli.checkpoint import staging, writer
from loftq_cli.errors import OutputExists


def run(output: Path, faulty: FaultyOs, *, force: bool = False, seed: int = 0) -> None:
    writer.os = staging.os = faulty  # type: ignore[assignment]
    staged_run(output, force=force, seed=seed)


def die(output: Path, position: int, force: bool) -> None:
    """A child process comes as far as this call, and no further."""
    child = os.fork()
    if child == 0:
        run(output, FaultyOs(position, death, WRITES + TIDYING), force=force)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), position
    assert os.WTERMSIG(status) == signal.SIGKILL, position


def main(directory: Path, force: bool) -> None:
    run(directory / "former", FaultyOs(), seed=1)
    run(directory / "whole", FaultyOs())
    former, expected = contents(directory / "former"), contents(directory / "whole")

    def prepared(name: str) -> Path:
        (directory / name).mkdir()
        if force:
            shutil.copytree(directory / "former", directory / name / "OUT")
        return directory / name / "OUT"

    counting = FaultyOs(watched=WRITES + TIDYING)
    run(prepared("counted"), counting, force=force)
    for position, name in enumerate(counting.calls):
        at = f"{name}, call {position}"
        output = prepared(str(position))
        die(output, position, force)
        # With --force there is one moment without an OUT: between the two renames of the swap.
        swapping = (output.parent / "OUT.partial" / "replaced").exists()
        absent = not force or swapping
        found = contents(output) if output.exists() else None
        assert found == expected or (found is None and absent) or (force and found == former), at
        assert {entry.name for entry in output.parent.iterdir()} <= {"OUT", "OUT.partial"}, at
        try:
            run(output, FaultyOs(), force=force)
        except OutputExists:
            assert not force, at
            assert found == expected, at
        assert contents(output) == expected, at
        assert [entry.name for entry in output.parent.iterdir()] == ["OUT"], at
    print(len(counting.calls), "deaths")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--force" in sys.argv)
