"""Processes of their own that need not import what is slow: forked from one that has quantized."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.warmed_up"])


def _with_streams(out: Path, err: Path, target: Callable[..., Any], arguments: Any) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    target(*arguments)


class Forked:
    """A running process, and what it has written so far."""

    def __init__(self, scratch: Path, target: Callable[..., Any], *arguments: object) -> None:
        self._out, self._err = scratch / "stdout", scratch / "stderr"
        for path in (self._out, self._err):
            path.write_bytes(b"")
        self.process: BaseProcess = FORKS.Process(
            target=_with_streams, args=(self._out, self._err, target, arguments)
        )
        self.process.start()

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def send(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(self.process.pid, number)

    def wait(self, seconds: float = 60) -> int | None:
        """The exit status, negative for a signal; None if it does not end."""
        self.process.join(seconds)
        return self.process.exitcode
