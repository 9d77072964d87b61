"""Every error a person can meet, and the exit code that a script sees.

    LoftqError               1   failed
    ├── ModelNotFound
    ├── UnsafeCheckpoint         pickle, paths that lead outside, code without consent
    ├── CorruptCheckpoint        truncated, inconsistent, or not a checkpoint at all
    ├── AlreadyQuantized
    ├── UnsupportedModel
    ├── NonFiniteWeight
    ├── InvalidSetting           a rank, block size or layer that does not fit this model
    │   └── UnknownTargetModule
    ├── OutputExists
    ├── WriteFailed
    ├── PushFailed               a hub did not take it
    ├── UsageError           2
    ├── CheckFailed          3   a check that was asked for failed
    └── DoesNotFit           4   memory or disk

An error says *what* went wrong, its *cause*, and as *hint* a command or a change that helps.
Code below the commands raises short messages; whoever knows more (the layer's name, the flag)
adds it on the way up with :meth:`LoftqError.within`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class LoftqError(Exception):
    """The root of all errors that are reported without a traceback."""

    exit_code = 1

    def __init__(self, what: str, *, cause: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.cause = cause
        self.hint = hint

    def within(self, place: str) -> LoftqError:
        """The same error, told from further out: ``place: what``."""
        return type(self)(f"{place}: {self.what}", cause=self.cause, hint=self.hint)


class ModelNotFound(LoftqError):
    """No model is to be had under this name."""


class UnsafeCheckpoint(LoftqError):
    """The checkpoint could run code or reach outside its directory; it was not opened."""


class CorruptCheckpoint(LoftqError):
    """A file of the checkpoint is truncated, contradicts itself, or is no such file at all."""


class AlreadyQuantized(LoftqError):
    """LoftQ needs the full-precision weights; this checkpoint no longer has them."""


class UnsupportedModel(LoftqError):
    """The model is readable, but this cannot be done with it."""


class NonFiniteWeight(LoftqError):
    """A weight holds NaN or infinity."""


class InvalidSetting(LoftqError):
    """A setting is well-formed but does not fit this model."""


class UnknownTargetModule(InvalidSetting):
    """No layer of the model is called that."""


class OutputExists(LoftqError):
    """The output is already there and nobody said to replace it."""


class WriteFailed(LoftqError):
    """The output could not be written."""


class PushFailed(LoftqError):
    """A hub did not take what was to be uploaded."""


class UsageError(LoftqError):
    """The command line contradicts itself."""

    exit_code = 2


class CheckFailed(LoftqError):
    """A check that was asked for failed. ``document`` has all of them, where there is one."""

    exit_code = 3
    document: Any = None


class DoesNotFit(LoftqError):
    """Not enough memory or disk."""

    exit_code = 4


def first_line(error: BaseException) -> str:
    """An error of some library as one line: its type and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def told_as(kind: type[LoftqError], what: str, hint: str | None = None) -> Iterator[None]:
    """Whatever a library raises, as an error of ours; a GPU without memory says so itself."""
    try:
        yield
    except LoftqError:
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise kind(what, cause=first_line(error), hint=hint) from error
