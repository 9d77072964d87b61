"""Where `generate` finds its prompts: the command line, a file, or a pipe."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from loftq_cli.errors import UsageError

_MOST_BYTES = 32_000_000


def read_prompts(
    given: list[str] | None, file: Path | None, note: Callable[[str], None]
) -> list[str]:
    """All prompts of a command line: those given, then those of the file, one a line.

    With neither, what is piped into the command is read; a person at the terminal is told.

    Raises:
        UsageError: there is no prompt, or the file cannot be read.
    """
    prompts = list(given or [])
    if file is not None:
        prompts += _lines(file)
    elif not prompts and not _at_terminal():
        note("reading prompts from stdin, one a line")
        prompts += _lines(Path("-"))
    if not prompts:
        raise UsageError("nothing to continue", hint='--prompt "Once upon a time"')
    return prompts


def _lines(file: Path) -> list[str]:
    """The lines of the file that are not blank; `-` is stdin."""
    piped = str(file) == "-"
    name = "stdin" if piped else str(file)
    try:
        with open(0 if piped else file, "rb", closefd=not piped) as opened:
            raw = opened.read(_MOST_BYTES + 1)
        if len(raw) > _MOST_BYTES:
            raise UsageError(f"{name} is too large for a list of prompts")
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read prompts from {name}", cause=error.strerror) from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"cannot read prompts from {name}", cause=f"it is not UTF-8 at byte {error.start}"
        ) from None
    lines = [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
    if not lines and not piped:
        raise UsageError(f"there is no prompt in {name}", cause="every line of it is blank")
    return lines


def _at_terminal() -> bool:
    try:
        return os.isatty(0)
    except OSError:
        return False
