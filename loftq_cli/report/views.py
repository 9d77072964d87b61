"""Which function shows which document. A new command adds its function to `VIEWS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from loftq_cli.report.check import check_view
from loftq_cli.report.compare import compare_view
from loftq_cli.report.generate import generate_view
from loftq_cli.report.load import load_view
from loftq_cli.report.quantize import quantize_view
from loftq_cli.report.report import report_view
from loftq_cli.report.sweep_ranks import sweep_ranks_view
from loftq_cli.report.tables import View
from loftq_cli.report.targets import targets_view
from loftq_cli.report.verify import verify_view
from loftq_cli.schema import Document


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
    "report": lambda document: report_view(document, view_of),
}
