"""A view as a page for a terminal: any width, with or without colour, every name whole."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loftq_cli.report.escape import visible
from loftq_cli.report.sparks import SPARKS_ASCII
from loftq_cli.report.tables import (
    Code,
    Facts,
    Heading,
    Passage,
    Section,
    Sentences,
    Table,
    View,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# Names and prose in columns narrower than this can hardly be read: the table is then laid out one
# value a line.
_NARROWEST = 14

_ASCII = str.maketrans({"×": "x", "±": "+-", "→": "->", "›": ">", **SPARKS_ASCII})
_ASCII_RULE = "    \n    \n -- \n    \n    \n    \n    \n    \n"  # box.SIMPLE_HEAD


def render(view: View, *, width: int, colour: bool, unicode: bool) -> str:
    from rich.console import Console

    buffer = io.StringIO()
    console = Console(
        file=buffer,
        width=width,
        force_terminal=colour,
        color_system="standard" if colour else None,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
        _environ={},  # what the environment asks for has been decided by the caller
    )
    page = _Page(console, unicode)
    page.line(view.title, "bold")
    for section in view.sections:
        console.print()
        page.section(section)
    for warning in view.warnings:
        console.print()
        page.line(f"warning: {warning}", "yellow")
    # Rich fills cells up to their column; a page should not end its lines in blanks.
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


class _Page:
    """A Rich console that shows text, never markup, in the characters that can be shown."""

    def __init__(self, console: Console, unicode: bool) -> None:
        self.console = console
        self.unicode = unicode

    def text(self, text: str, style: str = "") -> Text:
        from rich.text import Text

        text = visible(text)
        return Text(text if self.unicode else text.translate(_ASCII), style)

    def line(self, text: str, style: str = "", *, wrap: bool = True) -> None:
        self.console.print(self.text(text, style), soft_wrap=not wrap)

    def section(self, section: Section) -> None:
        match section:
            case Facts(items):
                self.grid([(f"  {label}", value) for label, value in items], gap=2, style="dim")
            case Table():
                self.table(section)
            case Heading(title):
                self.line(title, "bold underline")
            case Sentences(title, sentences):
                self.line(title, "bold")
                self.grid([("  -", sentence) for sentence in sentences], gap=1)
            case Passage(title, text, caption):
                self.line(title, "bold")
                for line in text.splitlines():
                    self.line(line, wrap=False)
                self.line(caption, "dim")
            case Code(title, lines):
                self.line(title)
                for line in lines:
                    self.line(f"    {line}", "cyan", wrap=False)

    def grid(self, rows: Sequence[tuple[str, str]], *, gap: int, style: str = "") -> None:
        """Texts that fold, each beside a short one."""
        from rich.table import Table as Grid

        grid = Grid.grid(padding=(0, gap))
        grid.add_column(style=style, no_wrap=True)
        grid.add_column(overflow="fold")
        for label, text in rows:
            grid.add_row(self.text(label), self.text(text))
        self.console.print(grid)

    def table(self, table: Table) -> None:
        from rich import box
        from rich.table import Table as Grid

        if self.needs(table) > self.console.width:
            table = table.in_words()
        if self.needs(table) > self.console.width:
            self.stacked(table)
            return
        titles = [self.text(column.title) for column in table.columns]
        rows = [
            [self.text(each.cell(item), each.style(each.value(item))) for each in table.columns]
            for item in table.items
        ]
        rule = box.SIMPLE_HEAD if self.unicode else box.Box(_ASCII_RULE)
        grid = Grid(
            title=self.text(table.title, "bold"),
            title_justify="left",
            box=rule,
            padding=(0, 1, 0, 0),
            pad_edge=False,
            show_edge=False,
        )
        for column, title in zip(table.columns, titles, strict=True):
            number, whole = column.kind == "number", column.kind in ("number", "picture")
            grid.add_column(
                title, justify="right" if number else "left", overflow="fold", no_wrap=whole
            )
        for texts in rows:
            grid.add_row(*texts)
        self.console.print(grid)

    def needs(self, table: Table) -> int:
        """Characters that the table takes at the least, where names and prose fold."""
        need = 2 * len(table.columns)
        for column in table.columns:
            cells = [column.title, *(column.cell(item) for item in table.items)]
            widest = max(self.text(cell).cell_len for cell in cells)
            need += widest if column.kind in ("number", "picture") else min(widest, _NARROWEST)
        return need

    def stacked(self, table: Table) -> None:
        """One value a line, for a terminal that is too narrow for the table."""
        self.line(table.title, "bold")
        for item in table.items:
            self.console.print()
            cells = [(column.title, column.cell(item)) for column in table.columns]
            self.section(Facts([(title, text) for title, text in cells if text]))
