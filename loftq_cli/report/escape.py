"""Text that others wrote, made safe to show."""

from __future__ import annotations


def visible(text: str) -> str:
    """The text with everything that a terminal would act on spelled out: `\\x1b`, `\\u202e`."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )
