"""A view as GitHub Markdown. Whatever a name contains, it stays text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from loftq_cli.report.escape import code_span, longest_run, visible
from loftq_cli.report.tables import (
    Code,
    Column,
    Facts,
    Heading,
    Passage,
    Section,
    Sentences,
    Table,
    View,
)

_ACTIVE = re.compile(r"([\\`*_\[\]<>|~#&!])")


def render(view: View) -> str:
    parts = [f"## {_text(view.title)}"]
    parts.extend(_section(section) for section in view.sections)
    parts.extend(f"> **Warning:** {_text(warning)}" for warning in view.warnings)
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(section: Section) -> str:
    match section:
        case Facts(items):
            return "\n".join(f"- **{_text(label)}:** {_text(value)}" for label, value in items)
        case Table():
            return _table(section)
        case Heading(title):
            return f"## {_text(title)}"
        case Sentences(title, items):
            return f"### {_text(title)}\n\n" + "\n".join(f"- {_text(item)}" for item in items)
        case Passage(title, text, caption):
            body = _fenced(visible(line) for line in text.splitlines())
            return f"### {_text(title)}\n\n{body}\n\n{_text(caption)}"
        case Code(title, lines):
            return f"{_text(title)}\n\n{_fenced(lines, 'python')}"


def _table(table: Table) -> str:
    table = table.in_words()

    def shown(column: Column, item: Any) -> str:
        return (_code if column.kind == "name" else _text)(column.cell(item))

    lines = [
        _row(_text(column.title) for column in table.columns),
        _row("---:" if column.kind == "number" else "---" for column in table.columns),
        *(_row(shown(column, item) for column in table.columns) for item in table.items),
    ]
    return f"### {_text(table.title)}\n\n" + "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _text(text: str) -> str:
    return _ACTIVE.sub(r"\\\1", visible(text))


def _code(text: str) -> str:
    """A code span in a table; a bar splits the row even in code."""
    return code_span(text.replace("|", "\\|")) if text else ""


def _fenced(lines: Iterable[str], language: str = "text") -> str:
    text = "\n".join(lines)
    fence = "`" * max(3, longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"
