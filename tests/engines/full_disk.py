"""What a worker, or a process of a node, does where the disk has no room for one of the files."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from loftq_cli.checkpoint import writer
from loftq_cli.engines import ray, workers
from loftq_cli.errors import LoftqError

NAME = "model-00005-of-00009.safetensors"
real_serve, real_run = workers._serve, ray._run


def allocate(fd: int, offset: int, size: int) -> None:
    if NAME in Path(f"/proc/self/fd/{fd}").readlink().name:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.posix_fallocate(fd, offset, size)


def fill() -> None:
    """In this process, from now on."""
    writer.os = SimpleNamespace(**{**vars(os), "posix_fallocate": allocate})  # type: ignore[attr-defined]


def serve(*arguments: Any) -> None:
    """`workers._serve`"""
    fill()
    real_serve(*arguments)


def run(*arguments: Any) -> Any:
    """`ray._run`"""
    fill()
    return real_run(*arguments)


# --- in the test ----------------------------------------------------------------------------------


def require_told(error: LoftqError, recorded: list[str]) -> None:
    """The cause and what to do are named, and something is kept."""
    assert "No space left on device" in str(error.cause)
    assert "finished files are kept" in str(error.hint)
    assert any(name.startswith("model-") for name in recorded)
    assert NAME not in recorded


def require_each_once(recorded: list[str]) -> None:
    """Of both runs together: what the first finished the second did not make again."""
    weights = [name for name in recorded if name.startswith("model-")]
    assert len(weights) == len(set(weights)) == 9
