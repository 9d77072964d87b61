"""What the documents say of the command line, taken from the command line itself.

python -m tests.reference      # writes examples/REFERENCE.md, and the README's table of commands
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from unittest import mock

import typer

from loftq_cli import cli

ROOT = Path(cli.__file__).parents[1]
README, REFERENCE = ROOT / "README.md", ROOT / "examples" / "REFERENCE.md"
_TABLE = re.compile(r"(?<=\| command \| \|\n\|---\|---\|\n)(\|.*\n)*")


def reference() -> str:
    """Every command's `--help`."""
    pages = [f"## loftq {name}\n\n```text\n{help_of(name)}\n```\n" for name in cli.COMMANDS]
    return (
        "# Every command and option\n\n"
        "What `loftq COMMAND --help` prints, written by `python -m tests.reference`.\n\n"
        + "\n".join(pages)
    )


def help_of(name: str) -> str:
    """As it is in a terminal of 100 columns."""
    group = typer.main.get_command(cli.app)
    with mock.patch.dict(os.environ, {"COLUMNS": "100"}):
        above = typer.Context(group, info_name="loftq")
        command = group.get_command(above, name)  # type: ignore[attr-defined]
        page = command.get_help(typer.Context(command, info_name=name, parent=above, **cli.CONTEXT))
    return "\n".join(line.rstrip() for line in page.strip().splitlines())


def with_commands(readme: str) -> str:
    """The README with a line for each command, as in `loftq --help`."""
    rows = "".join(f"| `{name}` | {line} |\n" for name, line in cli.COMMANDS.items())
    assert _TABLE.search(readme), "the README has no table of commands"
    return _TABLE.sub(lambda _: rows, readme)


if __name__ == "__main__":
    REFERENCE.write_text(reference(), "utf-8")
    README.write_text(with_commands(README.read_text("utf-8")), "utf-8")
