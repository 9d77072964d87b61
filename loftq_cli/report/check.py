"""What `check` verified, check by check, and what to do about what failed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loftq_cli.report import units
from loftq_cli.report.parts import choice, model_name
from loftq_cli.report.tables import Column, Facts, Section, Table, View
from loftq_cli.schema import CheckResults, CheckTest, Document

_STYLES = {"passed": "green", "failed": "bold red", "skipped": "yellow"}
# Rows of figures that a check may bring along, and how people read them.
_ROW_COLUMNS = (
    Column("rank", "rank", show=units.number),
    Column("trainable_parameters", "trainable", show=units.number),
    Column("trainable_percent", "of all", show=lambda value: units.percent(value / 100)),
    Column("reduction_factor", "reduction", show=lambda value: f"{value:,.1f} ×"),
    Column("adapter_bytes", "adapter", show=units.size),
    Column("memory_bytes", "to fine-tune", show=units.size),
)


def check_view(document: Document[CheckResults]) -> View:
    results = document.results
    summary = results.summary
    counts = [f"{summary.passed} passed"]
    counts += [f"{summary.failed} FAILED"] if summary.failed else []
    counts += [f"{summary.skipped} skipped"] if summary.skipped else []
    title = f"Checked this box with {model_name(document)}: {', '.join(counts)}"
    facts = Facts([*_choices(document), ("time", units.seconds(summary.seconds))])
    sections: list[Section] = [facts]
    for group in dict.fromkeys(test.group for test in results.tests):
        tests = [test for test in results.tests if test.group == group]
        sections.append(_group(group, tests))
        sections += [_rows(test) for test in tests if test.rows]
    sections += [_trouble(test) for test in results.tests if test.status == "failed"]
    return View(title, sections, _records(results))


def _choices(document: Document[Any]) -> list[tuple[str, str]]:
    """Everything that was chosen, with the reasons."""
    return [
        choice(document, name, str(resolved.value)) for name, resolved in document.resolved.items()
    ]


def _group(group: str, tests: Sequence[CheckTest]) -> Table:
    columns = [
        Column("name", "check", "prose"),
        Column("status", "result", style=lambda value: _STYLES.get(value, "")),
        Column("seconds", "time", show=units.seconds),
        Column("detail", "what was found", "prose"),
    ]
    rows = [[test.name, test.status, test.seconds, test.detail] for test in tests]
    return Table(group.capitalize(), columns, rows)


def _rows(test: CheckTest) -> Table:
    """The check's own table; figures that are new to this version show as they are."""
    known = {column.key: column for column in _ROW_COLUMNS}
    columns = [known.get(key, Column(key, key)) for key in test.rows[0]]
    rows = [[row.get(column.key) for column in columns] for row in test.rows]
    return Table(test.name.capitalize(), columns, rows)


def _trouble(test: CheckTest) -> Facts:
    items = [("failed", test.name), ("to verify", test.verified), ("found", test.detail)]
    items += [("cause", test.cause)] if test.cause else []
    items += [("hint", test.hint)] if test.hint else []
    return Facts(items)


def _records(results: CheckResults) -> Table:
    """One line a check; its figures are in one column, as key=value."""
    keys = ["name", "group", "status", "seconds", "verified", "detail", "cause", "hint"]
    rows = [
        [
            *(getattr(test, key) for key in keys),
            [f"{key}={value}" for key, value in test.figures.items()],
        ]
        for test in results.tests
    ]
    return Table("tests", [Column(key, key) for key in [*keys, "figures"]], rows)
