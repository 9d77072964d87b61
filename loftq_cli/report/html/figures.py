"""What of a result document is drawn: a list of figures for every command that has some."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from loftq_cli.report.html.compared import compare_figures
from loftq_cli.report.html.figure import Figure
from loftq_cli.report.html.merged import merge_figures
from loftq_cli.report.html.planned import sweep_ranks_figures, targets_figures
from loftq_cli.report.html.quantized import quantize_figures
from loftq_cli.report.html.tried import check_figures, generate_figures, load_figures
from loftq_cli.schema import Document

_FIGURES: Mapping[str, Callable[[Any], Iterator[Figure]]] = {
    "quantize": quantize_figures,
    "sweep-ranks": sweep_ranks_figures,
    "targets": targets_figures,
    "compare": compare_figures,
    "check": check_figures,
    "generate": generate_figures,
    "load": load_figures,
    "merge": merge_figures,
}


def figures_of(document: Document[Any]) -> list[Figure]:
    """The pictures of a document; of some commands there are none."""
    draw = _FIGURES.get(document.command)
    return [] if draw is None else [each for each in draw(document.results) if each.picture]
