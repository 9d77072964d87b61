"""The os module with functions replaced, or made to fail at one chosen call.

Given to a module as its `os` (`monkeypatch.setattr(writer, "os", ...)`), so that nothing else in
the process, pytest least of all, sees the difference.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

# What the writer asks of the disk. `pwrite` is its write, `makedirs` its mkdir.
WRITES = ("open", "pwrite", "fsync", "replace", "posix_fallocate", "makedirs", "ftruncate")
# Its other calls: a failure of these is only untidy, but a process can die at them too.
TIDYING = ("unlink", "rmdir", "close")


class PatchedOs:
    """os, with these functions instead of its own."""

    def __init__(self, **functions: Any) -> None:
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


class FaultyOs:
    """os, which calls `fault` instead of the watched call number `position`, and counts them all.

    Nothing is really fsynced: no power cut is being tested, and a disk would take its time.
    """

    def __init__(
        self,
        position: int | None = None,
        fault: Callable[[], object] = lambda: None,
        watched: tuple[str, ...] = WRITES,
    ) -> None:
        self.calls: list[str] = []
        self._position = position
        self._fault = fault
        self._watched = watched

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self._watched:
            return real

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) - 1 == self._position:
                self._fault()
            return None if name == "fsync" else real(*args, **kwargs)

        return call


def failure(code: int) -> Callable[[], None]:
    """What raises the OSError of this errno."""

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    return fail


def death() -> None:
    """No handler runs, nothing is tidied up."""
    os.kill(os.getpid(), signal.SIGKILL)
