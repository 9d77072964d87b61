"""A view as GitHub Markdown. Whatever a name contains, it stays text."""

from __future__ import annotations

import re

from loftq_cli.report.escape import visible
from loftq_cli.report.tables import (
    Code,
    Facts,
    Heading,
    Passage,
    Section,
    Sentences,
    Table,
    View,
    cell,
)

_ACTIVE = re.compile(r"([\\`*_\[\]<>|~#&!])")


def render(view: View) -> str:
    parts = [f"## {_text(view.title)}"]
    parts.extend(_section(section) for section in view.sections)
    parts.extend(f"> **Warning:** {_text(warning)}" for warning in view.warnings)
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(section: Section) -> str:
    if isinstance(section, Facts):
        return "\n".join(f"- **{_text(label)}:** {_text(value)}" for label, value in section.items)
    if isinstance(section, Table):
        return _table(section)
    if isinstance(section, Heading):
        return f"## {_text(section.title)}"
    if isinstance(section, Sentences):
        items = "\n".join(f"- {_text(item)}" for item in section.items)
        return f"### {_text(section.title)}\n\n{items}"
    if isinstance(section, Passage):
        body = _fenced("\n".join(visible(line) for line in section.text.splitlines()))
        return f"### {_text(section.title)}\n\n{body}\n\n{_text(section.caption)}"
    assert isinstance(section, Code)
    return f"{_text(section.title)}\n\n{_fenced(chr(10).join(section.lines), section.language)}"


def _table(table: Table) -> str:
    rules = ["---:" if column.kind == "number" else "---" for column in table.columns]
    lines = [
        _row([_text(column.title) for column in table.columns]),
        _row(rules),
    ]
    for row in table.rows:
        cells = zip(table.columns, row, strict=True)
        lines.append(
            _row(
                [
                    _code(cell(column, value))
                    if column.kind == "name"
                    else _text(cell(column, value))
                    for column, value in cells
                ]
            )
        )
    return f"### {_text(table.title)}\n\n" + "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _text(text: str) -> str:
    return _ACTIVE.sub(r"\\\1", visible(text))


def _code(text: str) -> str:
    """A code span. Backticks inside need a longer fence; a bar splits the row even in code."""
    if not text:
        return ""
    text = visible(text).replace("|", "\\|")
    fence = "`" * (_longest_run(text) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _fenced(text: str, language: str = "text") -> str:
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall(r"`+", text)), default=0)
