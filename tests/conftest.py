"""What every test may use."""

from __future__ import annotations

import gc
import io
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

# As `loftq` itself does, and here before any test imports torch.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Whatever is written is synced, for which a disk takes longer than tests this small work: where
# there is room their directories lie in memory, also those of the processes that they start.
_MEMORY, _ROOM = "/dev/shm", 3 << 30
if (
    "TMPDIR" not in os.environ
    and os.access(_MEMORY, os.W_OK)
    and shutil.disk_usage(_MEMORY).free > _ROOM
):
    os.environ["TMPDIR"] = tempfile.tempdir = _MEMORY
# A shell starts what it sends to the background with SIGINT ignored, and processes that are started
# here would inherit that: tests that interrupt one would then wait for nothing.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def libraries_are_no_garbage() -> None:
    """Nor are they looked through again and again for any."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from threads, which spin against a busy machine's work."""
    torch = sys.modules.get("torch")
    if torch is None:  # none of the tests that were collected needs it
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Outcome:
    """How a command line ended, and all that reached its file descriptors 1 and 2."""

    code: int
    out: str
    err: str


@contextmanager
def _descriptors(directory: Path) -> Iterator[tuple[Path, Path]]:
    """Points file descriptors 1 and 2, and Python's streams over them, at files.

    pytest's own capture would do for `print`, but not for the claim under test, which is about
    descriptors; and a claimed stdout is never given back, so it is put back here.
    """
    files = directory / "stdout", directory / "stderr"
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    streams = sys.stdout, sys.stderr
    try:
        for number, file in enumerate(files, start=1):
            opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            os.dup2(opened, number)
            os.close(opened)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8")
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding="utf-8")
        yield files
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams
        for number, copy in enumerate(saved, start=1):
            os.dup2(copy, number)
            os.close(copy)


@pytest.fixture(scope="session")
def loftq(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """Runs a command line in this process: `loftq("load", "--json").out`."""
    from loftq_cli.cli import main

    def run(*argv: object) -> Outcome:
        with _descriptors(tmp_path_factory.mktemp("streams")) as (out, err):
            code = main([str(each) for each in argv])
        return Outcome(code, out.read_text("utf-8"), err.read_text("utf-8"))

    return run
