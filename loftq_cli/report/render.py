"""One document, one form: the way in to everything else here.

A new command adds its function to `VIEWS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from loftq_cli.report import markdown, tables, text
from loftq_cli.report.check import check_view
from loftq_cli.report.compare import compare_view
from loftq_cli.report.export import export_view
from loftq_cli.report.generate import generate_view
from loftq_cli.report.load import load_view
from loftq_cli.report.merge import merge_view
from loftq_cli.report.push import push_view
from loftq_cli.report.quantize import quantize_view
from loftq_cli.report.report import report_view
from loftq_cli.report.sweep_ranks import sweep_ranks_view
from loftq_cli.report.tables import View
from loftq_cli.report.targets import targets_view
from loftq_cli.report.verify import verify_view
from loftq_cli.schema import Document


def render(
    document: Document[Any],
    form: Literal["table", "tsv", "md", "html"],
    *,
    width: int = 80,
    colour: bool = False,
    unicode: bool = True,
) -> str:
    """The document as a page for a terminal or a browser, as tab-separated records, or Markdown."""
    if form == "html":
        from loftq_cli.report.html.page import page

        return page(document, view_of)
    view = view_of(document)
    if form == "tsv":
        return tables.tsv(view.records)
    if form == "md":
        return markdown.render(view)
    return text.render(view, width=width, colour=colour, unicode=unicode)


def view_of(document: Document[Any]) -> View:
    """What there is to see in the document."""
    return replace(VIEWS[document.command](document), warnings=document.warnings)


VIEWS: Mapping[str, Callable[[Document[Any]], View]] = {
    "quantize": quantize_view,
    "load": load_view,
    "sweep-ranks": sweep_ranks_view,
    "targets": targets_view,
    "generate": generate_view,
    "compare": compare_view,
    "check": check_view,
    "verify": verify_view,
    "export": export_view,
    "merge": merge_view,
    "push": push_view,
    "report": lambda document: report_view(document, view_of),
}
