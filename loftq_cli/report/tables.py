"""What is shown, before anyone decides how: sections of facts, tables, passages and code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Shown: TypeAlias = Callable[[Any], str]


@dataclass(frozen=True)
class Column:
    """`key` heads the column in TSV and carries the unit; `title` and `show` are for people."""

    key: str
    title: str
    kind: Literal["name", "prose", "number"] = "number"  # a name is out of the model: verbatim
    show: Shown = str
    style: Shown = lambda value: ""  # on a terminal with colour


@dataclass(frozen=True)
class Table:
    """Rows of raw values. A None is shown as nothing."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Facts:
    """A few labelled values, already in words."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Passage:
    """Running text of someone else's, kept line by line, with a caption below."""

    title: str
    text: str
    caption: str


@dataclass(frozen=True)
class Code:
    """Lines to copy; never wrapped."""

    title: str
    language: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Sentences:
    """A list of sentences, each a point of its own."""

    title: str
    items: Sequence[str]


@dataclass(frozen=True)
class Heading:
    """What follows, up to the next heading, belongs together."""

    title: str


Section: TypeAlias = Facts | Table | Passage | Code | Sentences | Heading


@dataclass(frozen=True)
class View:
    """A document as people see it (`sections`) and as pipes see it (`records`)."""

    title: str
    sections: Sequence[Section]
    records: Table
    warnings: Sequence[str] = ()


def cell(column: Column, value: Any) -> str:
    """The value in words."""
    return "" if value is None else column.show(value)


def tsv(table: Table) -> str:
    """A header of keys and one line a row, every value raw and whole."""
    lines = ["\t".join(column.key for column in table.columns)]
    lines.extend("\t".join(map(_raw, row)) for row in table.rows)
    return "\n".join(lines) + "\n"


_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}


def _raw(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(_raw, value))
    # `cut` and `awk` split at tabs and newlines, and a terminal acts on the other controls.
    return "".join(
        _ESCAPES.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode("ascii"))
        for c in str(value)
    )
