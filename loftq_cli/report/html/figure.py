"""A figure, and what those of several commands are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from loftq_cli.report import units
from loftq_cli.report.html import svg
from loftq_cli.report.tables import Column, Table

# Lines in one picture that can still be told apart.
MOST_SERIES = 6


@dataclass(frozen=True)
class Figure:
    """A picture, one sentence on how to read it, and its numbers."""

    title: str
    picture: str
    note: str
    table: Table


def numbers(keys: Sequence[str], rows: Sequence[Sequence[Any]], title: str) -> Table:
    """A table of what was drawn; the first column names the row."""
    columns = [
        Column(itemgetter(at), key, "number" if at else "name") for at, key in enumerate(keys)
    ]
    return Table(title, columns, rows)


def bars(
    title: str,
    rows: Sequence[tuple[str, float, str]],
    keys: tuple[str, str],
    note: str,
    marked: str | None = None,
) -> Figure:
    table = numbers(keys, [[name, words] for name, _, words in rows], title)
    return Figure(title, svg.bars(title, rows, marked) if rows else "", note, table)


def size(value: float) -> str:
    return units.size(round(value))
