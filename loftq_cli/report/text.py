"""A view as a page for a terminal: any width, with or without colour, every name whole."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from loftq_cli.report.escape import visible
from loftq_cli.report.tables import Code, Facts, Passage, Section, Table, View, cell

if TYPE_CHECKING:
    from rich.console import Console

# Names and prose in columns narrower than this fold into confetti: the table is then laid out one
# value a line.
_NARROWEST = 14

_ASCII = str.maketrans({"×": "x", "→": "->", "·": "*", "√": "sqrt ", "−": "-", "…": "..."})


def render(view: View, *, width: int, colour: bool, unicode: bool) -> str:
    from rich.console import Console
    from rich.text import Text

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
    console.print(Text(visible(view.title), style="bold"))
    for section in view.sections:
        console.print()
        _print(console, section, unicode)
    for warning in view.warnings:
        console.print()
        console.print(Text(f"warning: {visible(warning)}", style="yellow"))
    # Rich fills cells up to their column; a page should not end its lines in blanks.
    page = "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
    return page if unicode else page.translate(_ASCII)


def _print(console: Console, section: Section, unicode: bool) -> None:
    from rich.text import Text

    if isinstance(section, Facts):
        _print_facts(console, section)
    elif isinstance(section, Table):
        _print_table(console, section, unicode)
    elif isinstance(section, Passage):
        console.print(Text(visible(section.title), style="bold"))
        for line in section.text.splitlines():
            console.print(Text(visible(line)), soft_wrap=True)
        console.print(Text(section.caption, style="dim"))
    else:
        assert isinstance(section, Code)
        console.print(Text(section.title))
        for line in section.lines:
            console.print(Text(f"    {line}", style="cyan"), soft_wrap=True)


def _print_facts(console: Console, facts: Facts) -> None:
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in facts.items:
        grid.add_row(Text(f"  {label}"), Text(visible(value)))
    console.print(grid)


def _print_table(console: Console, table: Table, unicode: bool) -> None:
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text

    shown = [
        [visible(cell(column, value)) for column, value in zip(table.columns, row, strict=True)]
        for row in table.rows
    ]
    if not _fits(table, shown, console.width):
        _print_stacked(console, table, shown)
        return
    rule = box.SIMPLE_HEAD if unicode else box.Box(str(box.SIMPLE_HEAD).replace("─", "-"))
    grid = Grid(
        title=Text(table.title, style="bold"),
        title_justify="left",
        box=rule,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for column in table.columns:
        grid.add_column(
            Text(column.title),
            justify="right" if column.kind == "number" else "left",
            overflow="fold",
            no_wrap=column.kind == "number",
        )
    for row in shown:
        grid.add_row(*map(Text, row))
    console.print(grid)


def _fits(table: Table, shown: list[list[str]], width: int) -> bool:
    """Whether the numbers fit beside names and prose of a readable width."""
    from rich.cells import cell_len

    need = 0
    for index, column in enumerate(table.columns):
        widest = max(map(cell_len, [column.title, *(row[index] for row in shown)]))
        need += widest if column.kind == "number" else min(widest, _NARROWEST)
    return need + 2 * len(table.columns) <= width


def _print_stacked(console: Console, table: Table, shown: list[list[str]]) -> None:
    from rich.text import Text

    console.print(Text(table.title, style="bold"))
    for row in shown:
        console.print()
        pairs = zip(table.columns, row, strict=True)
        _print_facts(console, Facts([(column.title, value) for column, value in pairs if value]))
