"""Runs checks one after the other; one that fails does not keep the others from running."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from loftq_cli.errors import LoftqError, first_line
from loftq_cli.record import Progress

Figures: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """What a check found: in words, as figures with the unit in the name, and as a table."""

    detail: str
    figures: Figures = field(default_factory=dict)
    rows: Sequence[Figures] = ()


@dataclass(frozen=True)
class Check:
    """One check. ``run`` returns what it found, or raises what is wrong.

    ``needs`` names earlier checks without which there is nothing to look at.
    """

    name: str
    group: str
    verifies: str
    run: Callable[[], Finding]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How one check went."""

    check: Check
    status: Literal["passed", "failed", "skipped"]
    seconds: float
    finding: Finding
    cause: str | None = None
    hint: str | None = None


class NothingToCheck(Exception):
    """This model has nothing that the check is about; the message says why."""


def run_checks(
    checks: Iterable[Check], progress: Progress, trace: Callable[[], None]
) -> list[Outcome]:
    """Every check's outcome, in order.

    Args:
        trace: called while an unexpected error is being handled, for whoever wants to see it.
    """
    outcomes: list[Outcome] = []
    for check in checks:
        progress.start(check.name)
        outcomes.append(_run(check, outcomes, trace))
        progress.advance(check.name)
    return outcomes


def _run(check: Check, earlier: Sequence[Outcome], trace: Callable[[], None]) -> Outcome:
    missing = [
        outcome
        for outcome in earlier
        if outcome.check.name in check.needs and outcome.status != "passed"
    ]
    if missing:
        blocker = missing[0]
        reason = f"'{blocker.check.name}' {blocker.status}"
        return Outcome(check, "skipped", 0.0, Finding(f"not run: {reason}"), reason)
    began = time.perf_counter()

    def ended(
        status: Literal["passed", "failed", "skipped"],
        finding: Finding,
        cause: str | None = None,
        hint: str | None = None,
    ) -> Outcome:
        return Outcome(check, status, time.perf_counter() - began, finding, cause, hint)

    try:
        return ended("passed", check.run())
    except NothingToCheck as reason:
        return ended("skipped", Finding(f"not run: {reason}"), str(reason))
    except LoftqError as error:
        return ended("failed", Finding(error.what), error.cause or error.what, error.hint)
    except Exception as error:  # a broken box breaks libraries in ways of its own
        trace()
        return ended(
            "failed",
            Finding(f"unexpected {type(error).__name__}"),
            first_line(error),
            "run it again with --debug to see where it happened",
        )
