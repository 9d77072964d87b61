"""Text that others wrote, made safe to show."""

from __future__ import annotations

import re
import shlex


def visible(text: str) -> str:
    """The text with everything that a terminal would act on spelled out: `\\x1b`, `\\u202e`."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def code_span(text: str) -> str:
    """The text as code in a line of Markdown. Backticks inside need a longer fence."""
    text = visible(text)
    fence = "`" * (longest_run(text) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def shell_word(text: str) -> str:
    """One word of a command line; what is not printable is spelled out, as bash reads it."""
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + visible(text.replace("\\", r"\\").replace("'", r"\'")) + "'"


def longest_run(text: str) -> int:
    """The most backticks in a row."""
    return max((len(run) for run in re.findall(r"`+", text)), default=0)
