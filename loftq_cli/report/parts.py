"""What the views, findings and recommendations of several commands have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from loftq_cli.report import units
from loftq_cli.report.tables import Column, Facts, Records, Table, fields
from loftq_cli.schema import CheckResults, CheckTest, Document, Remark

_STYLES = {"passed": "green", "failed": "bold red", "skipped": "yellow"}


def model_name(document: Document[Any]) -> str:
    """The model as its user would type it, with the revision that it came to."""
    model = document.model
    if model is None:
        return "the model"
    return model.id if model.revision is None else f"{model.id} ({model.revision})"


def choice(document: Document[Any], name: str, value: str) -> tuple[str, str]:
    """A value with the reason for it, where it was chosen."""
    resolved = document.resolved.get(name)
    return (name, value if resolved is None else f"{value} ({resolved.reason})")


def remark(document: Document[Any], text: str) -> Remark:
    """One sentence about a document."""
    model = None if document.model is None else document.model.id
    return Remark(command=document.command, model=model, text=text)


Rules: TypeAlias = Mapping[str, Callable[[Document[Any]], Iterable[str]]]


def remarks(documents: Iterable[Document[Any]], rules: Rules) -> list[Remark]:
    """What the rules for its command say of each document."""
    return [
        remark(document, text)
        for document in documents
        if document.command in rules
        for text in rules[document.command](document)
    ]


# --- checks, of `check` and `verify` alike -------------------------------------------------------


def checks_table(title: str, tests: Sequence[CheckTest]) -> Table:
    columns = [
        Column("name", "check", "prose"),
        Column("status", "result", style=lambda value: _STYLES.get(value, "")),
        Column("seconds", "time", show=units.seconds),
        Column("detail", "what was found", "prose"),
    ]
    return Table(title, columns, tests)


def trouble(test: CheckTest, **more: str) -> Facts:
    """A check that failed, and what helps."""
    told = {"failed": test.name, "to verify": test.verified, **more}
    told |= {"cause": test.cause or "", "hint": test.hint or ""}
    return Facts([(label, text) for label, text in told.items() if text])


def check_records(tests: Sequence[CheckTest], *more: str) -> Records:
    """One line a check; its figures are in one column, as key=value."""
    keys = ["name", *more, "status", "seconds", "verified", "detail", "cause", "hint"]
    rows = [
        [*row, [f"{key}={value}" for key, value in test.figures.items()]]
        for row, test in zip(fields(tests, keys), tests, strict=True)
    ]
    return Records([*keys, "figures"], rows)


def figures(document: Document[CheckResults], name: str) -> Mapping[str, Any]:
    """The figures of a check that passed; none if it did not, or was not there."""
    tests = {test.name: test for test in document.results.tests}
    test = tests.get(name)
    return test.figures if test is not None and test.status == "passed" else {}
