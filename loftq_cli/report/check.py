"""What `check` verified, check by check, and what to do about what failed."""

from __future__ import annotations

from types import SimpleNamespace

from loftq_cli.report import units
from loftq_cli.report.checks import check_records, checks_table, trouble
from loftq_cli.report.parts import choice, model_name
from loftq_cli.report.tables import Column, Facts, Section, Table, View
from loftq_cli.schema import CheckResults, CheckTest, Document

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
    choices = [choice(document, name, str(each.value)) for name, each in document.resolved.items()]
    sections: list[Section] = [Facts([*choices, ("time", units.seconds(summary.seconds))])]
    for group in dict.fromkeys(test.group for test in results.tests):
        tests = [test for test in results.tests if test.group == group]
        sections.append(checks_table(group.capitalize(), tests))
        sections += [_rows(test) for test in tests if test.rows]
    sections += [
        trouble(test, found=test.detail) for test in results.tests if test.status == "failed"
    ]
    return View(title, sections, check_records(results.tests, "group"))


def _rows(test: CheckTest) -> Table:
    """The check's own table; figures that are new to this version show as they are."""
    keys = test.rows[0]
    known = {column.of: column for column in _ROW_COLUMNS}
    columns = [known.get(key, Column(key, key)) for key in keys]
    rows = [SimpleNamespace(**(dict.fromkeys(keys) | row)) for row in test.rows]
    return Table(test.name.capitalize(), columns, rows)
