"""One document, one form: the way in to everything else here."""

from __future__ import annotations

from typing import Any, Literal

from loftq_cli.report import markdown, tables, text
from loftq_cli.report.views import view_of
from loftq_cli.schema import Document


def render(
    document: Document[Any],
    form: Literal["table", "tsv", "md"],
    *,
    width: int = 80,
    colour: bool = False,
    unicode: bool = True,
) -> str:
    """The document as a page for a terminal, as tab-separated records, or as Markdown."""
    view = view_of(document)
    if form == "tsv":
        return tables.tsv(view.records)
    if form == "md":
        return markdown.render(view)
    return text.render(view, width=width, colour=colour, unicode=unicode)
