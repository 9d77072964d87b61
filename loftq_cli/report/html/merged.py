"""What quantizing merged weights again costs, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator

from loftq_cli.report.html.figure import Figure
from loftq_cli.report.html.quantized import requantizing_errors
from loftq_cli.schema import MergeResults


def merge_figures(results: MergeResults) -> Iterator[Figure]:
    if (again := results.requantized) is not None:
        yield from requantizing_errors(again.layers)
