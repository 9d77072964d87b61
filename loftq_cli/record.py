"""What one run of a command finds worth telling: to whoever listens, and to the result document."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from loftq_cli import __version__

if TYPE_CHECKING:
    from loftq_cli.schema import Document, ModelIdentity, Results, Scalar


class Progress:
    """Is told which piece of a stage is being worked on and which is done; this one keeps quiet."""

    def start(self, name: str) -> None:
        """The piece called ``name`` is being worked on."""

    def advance(self, name: str = "") -> None:
        """One more piece, called ``name``, is done."""


class Listener:
    """Is told what a run does while it does it; this one keeps quiet.

    Whoever wants to see something overrides the method that tells it.
    """

    def note(self, text: str) -> None:
        """Something nice to know."""

    def warn(self, text: str) -> None:
        """Something that the result's reader must know; it is in the document too."""

    def progress(self, label: str, total: int) -> AbstractContextManager[Progress]:
        """A stage of ``total`` pieces begins; it ends when the context is left."""
        return nullcontext(Progress())

    def busy(self, doing: str) -> AbstractContextManager[None]:
        """Something that takes long and cannot be counted, until the context is left."""
        return nullcontext()

    def trace(self) -> None:
        """Called while an unexpected error is handled that will not be raised again."""


class Record:
    """One run: its warnings, automatic choices and timings, which become the document's envelope.

    ``name`` is the command's, ``argv`` the command line that asks for the same.
    """

    def __init__(self, name: str, argv: Sequence[str], listener: Listener) -> None:
        self.name = name
        self.listener = listener
        self._argv = list(argv)
        self._warnings: list[str] = []
        self._resolved: dict[str, dict[str, Scalar]] = {}
        self._timings: dict[str, float] = {}
        self._began = time.perf_counter()

    def note(self, text: str) -> None:
        """Tells the listener only."""
        self.listener.note(text)

    def warn(self, text: str) -> None:
        """Tells the listener and every later reader of the document, once."""
        if text not in self._warnings:
            self.listener.warn(text)
            self._warnings.append(text)

    def progress(self, label: str, total: int) -> AbstractContextManager[Progress]:
        """`with record.progress("quantize", n) as p:` then `p.start(name)`, `p.advance(name)`."""
        return self.listener.progress(label, total)

    def resolved(self, name: str, value: Scalar, reason: str) -> None:
        """Records what an automatic choice became, and why."""
        self._resolved[name] = {"value": value, "reason": reason}

    @contextmanager
    def timing(self, name: str, doing: str | None = None) -> Iterator[None]:
        """Adds the time spent inside to `timings_seconds[name]`, also when it fails.

        ``doing`` is told to the listener meanwhile.
        """
        began = time.perf_counter()
        try:
            with nullcontext() if doing is None else self.listener.busy(doing):
                yield
        finally:
            self.add_timings({name: time.perf_counter() - began})

    def add_timings(self, seconds: Mapping[str, float]) -> None:
        """Adds what was measured elsewhere, such as stages that ran side by side."""
        for name, spent in seconds.items():
            self._timings[name] = self._timings.get(name, 0.0) + spent

    def seconds(self, *names: str) -> float:
        """What was measured so far under these names."""
        return sum(self._timings.get(name, 0.0) for name in names)

    def document(
        self, results: Results, *, model: ModelIdentity | None = None
    ) -> Document[Results]:
        """The result document as of now; validated, so a NaN in it is found here."""
        from loftq_cli import hardware, schema

        return schema.Document[type(results)].model_validate(  # type: ignore[misc,no-any-return]
            {
                "schema": f"loftq/{self.name}",
                "tool": {"name": "loftq", "version": __version__},
                "argv": self._argv,
                "model": model,
                "resolved": self._resolved,
                "environment": hardware.environment(),
                "results": results,
                "warnings": self._warnings,
                "timings_seconds": self._timings | {"total": time.perf_counter() - self._began},
            }
        )
