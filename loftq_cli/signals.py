"""Ctrl-C and SIGTERM, as exceptions that end a run wherever they arrive.

A signal's handler raises in the main thread, whatever that is doing, and not every place lets the
exception through: Python drops it where an object is being collected, and where a library is being
imported it may be caught, or leave that library half imported, so that the run goes on, or fails
with an ImportError. So it is raised again until something ends the run, and whatever that is, the
run was interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any


class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt it passes `except Exception` and runs `finally`."""


_RAISED = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
_PAUSE_SECONDS = 0.05


class Signals:
    """`with Signals() as signals:` a run; afterwards `signals.heard` is what it was told, if any.

    A signal that is ignored from the beginning, as in what a shell script sends to the background,
    stays ignored.
    """

    def __init__(self) -> None:
        self.heard: BaseException | None = None
        self._is_looking = False
        self._over = threading.Event()
        self._again: threading.Thread | None = None
        self._before: dict[int, Any] = {}
        self._hook = sys.unraisablehook

    def __enter__(self) -> Signals:
        self._hook, sys.unraisablehook = sys.unraisablehook, self._dropped
        for number in _RAISED:
            if (before := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                self._before[number] = before
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._again is not None:
            self._again.join()
        for number, before in self._before.items():
            signal.signal(number, before)
        sys.unraisablehook = self._hook

    def _handle(self, number: int, frame: FrameType | None) -> None:
        looking, self._is_looking = self._is_looking, False
        if self._over.is_set() or (looking and _is_ending()):
            return
        self.heard = _RAISED[signal.Signals(number)]()
        if self._again is None:
            self._again = threading.Thread(target=self._look, args=[number], daemon=True)
            self._again.start()
        raise self.heard

    def _look(self, number: int) -> None:
        """Lets the handler look, now and then, whether its exception is still on its way."""
        while not self._over.wait(_PAUSE_SECONDS):
            self._is_looking = True
            os.kill(os.getpid(), number)

    def _dropped(self, what: sys.UnraisableHookArgs) -> None:
        if not issubclass(what.exc_type, (KeyboardInterrupt, Terminated)):
            self._hook(what)


def _is_ending() -> bool:
    """Whether the code below a handler is cleaning up after an exception of `_RAISED`."""
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, KeyboardInterrupt | Terminated):
            return True
        error = error.__context__
    return False
