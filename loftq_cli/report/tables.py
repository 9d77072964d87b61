"""What is shown, before anyone decides how: sections of facts, tables, passages and code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from loftq_cli.report.escape import visible

Shown: TypeAlias = Callable[[Any], str]


@dataclass(frozen=True)
class Column:
    """What to show of an item, and how: an attribute by its name, or what a function makes of it.

    A value that is None is shown as nothing. A name is out of the model, and shown verbatim; a
    picture (`sparks.py`) says nothing that the other columns do not, and is only for terminals that
    are wide enough.
    """

    of: str | Callable[[Any], Any]
    title: str
    kind: Literal["name", "prose", "number", "picture"] = "number"
    show: Shown = str
    style: Shown = lambda value: ""  # on a terminal with colour

    def value(self, item: Any) -> Any:
        return getattr(item, self.of) if isinstance(self.of, str) else self.of(item)

    def cell(self, item: Any) -> str:
        value = self.value(item)
        return "" if value is None else self.show(value)


@dataclass(frozen=True)
class Table:
    """A row for each item."""

    title: str
    columns: Sequence[Column]
    items: Sequence[Any]

    def in_words(self) -> Table:
        """The same without columns that are pictures."""
        return replace(self, columns=[each for each in self.columns if each.kind != "picture"])


@dataclass(frozen=True)
class Records:
    """What a pipe gets: lines of raw values, below a line of keys."""

    keys: Sequence[str]
    rows: Sequence[Sequence[Any]]

    @staticmethod
    def of(items: Iterable[Any], keys: Sequence[str]) -> Records:
        """A line for each item, of its attributes called ``keys``."""
        return Records(keys, fields(items, keys))


def fields(items: Iterable[Any], keys: Sequence[str]) -> list[list[Any]]:
    return [[getattr(item, key) for key in keys] for item in items]


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
    """Lines of Python to copy; never wrapped."""

    title: str
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
    records: Records
    warnings: Sequence[str] = ()


def tsv(records: Records) -> str:
    """A header of keys and one line a row, every value raw and whole."""
    lines = ["\t".join(records.keys)]
    lines.extend("\t".join(map(_raw, row)) for row in records.rows)
    return "\n".join(lines) + "\n"


def _raw(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(_raw, value))
    # `cut` and `awk` split at tabs and newlines, and a terminal acts on the other controls.
    return visible(str(value).replace("\\", "\\\\"))
