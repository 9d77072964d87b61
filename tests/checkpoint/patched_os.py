"""The os module with functions replaced, or made to fail at one chosen call.

Given to a module as its `os` (`monkeypatch.setattr(writer, "os", ...)`), so that nothing else in
the process, pytest least of all, sees the difference.
"""

from __future__ import annotations

import os
from typing import Any

# What the writer asks of the disk. `pwrite` is its write, `makedirs` its mkdir.
WATCHED = ("open", "pwrite", "fsync", "replace", "posix_fallocate", "makedirs", "ftruncate")


class PatchedOs:
    """os, with these functions instead of its own."""

    def __init__(self, **functions: Any) -> None:
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


class FaultyOs:
    """os, whose watched call number `position` fails with this errno; without one it counts.

    Nothing is really fsynced: no power cut is being tested, and a disk would take its time.
    """

    def __init__(self, position: int | None = None, code: int = 0) -> None:
        self.calls: list[str] = []
        self._position = position
        self._code = code

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in WATCHED:
            return real

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) - 1 == self._position:
                raise OSError(self._code, os.strerror(self._code), str(args[0]))
            return None if name == "fsync" else real(*args, **kwargs)

        return call
