"""Runs checks one after the other; one that fails does not keep the others from running."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from loftq_cli.errors import LoftqError, first_line
from loftq_cli.record import Progress
from loftq_cli.schema import CheckSummary, CheckTest

Figures: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """What a check found: in words, as figures with the unit in the name, and as a table.

    ``notes`` tell what it did not look at.
    """

    detail: str
    figures: Figures = field(default_factory=dict)
    rows: Sequence[Figures] = ()
    notes: Sequence[str] = ()


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


class NothingToCheck(Exception):
    """This model has nothing that the check is about; the message says why."""


def run_checks(
    checks: Iterable[Check], progress: Progress, trace: Callable[[], None]
) -> list[CheckTest]:
    """How every check went, in order.

    Args:
        trace: called while an unexpected error is being handled, for whoever wants to see it.
    """
    tests: list[CheckTest] = []
    for check in checks:
        progress.start(check.name)
        tests.append(_run(check, tests, trace))
        progress.advance(check.name)
    return tests


def summary(tests: Sequence[CheckTest]) -> CheckSummary:
    """How many there are of each status, and the seconds of all."""
    count = Counter(test.status for test in tests)
    return CheckSummary(
        total=len(tests),
        passed=count["passed"],
        failed=count["failed"],
        skipped=count["skipped"],
        seconds=math.fsum(test.seconds for test in tests),
    )


def _run(check: Check, earlier: Sequence[CheckTest], trace: Callable[[], None]) -> CheckTest:
    missing = [each for each in earlier if each.name in check.needs and each.status != "passed"]
    status: Literal["passed", "failed", "skipped"] = "passed"
    cause = hint = None
    began = time.perf_counter()
    try:
        if missing:
            raise NothingToCheck(f"'{missing[0].name}' {missing[0].status}")
        finding = check.run()
    except NothingToCheck as reason:
        status, finding, cause = "skipped", Finding(f"not run: {reason}"), str(reason)
    except LoftqError as error:
        status, finding = "failed", Finding(error.what)
        cause, hint = error.cause or error.what, error.hint
    except Exception as error:  # a broken box breaks libraries in ways of its own
        trace()
        status, finding = "failed", Finding(f"unexpected {type(error).__name__}")
        cause, hint = first_line(error), "run it again with --debug to see where it happened"
    return CheckTest(
        name=check.name,
        group=check.group,
        status=status,
        seconds=0.0 if missing else time.perf_counter() - began,
        verified=check.verifies,
        detail=finding.detail,
        figures=finding.figures,
        rows=list(finding.rows),
        notes=list(finding.notes),
        cause=cause,
        hint=hint,
    )
