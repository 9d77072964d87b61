"""What a `quantize` run did, by layer, by iteration, by part."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from loftq_cli.report import units
from loftq_cli.report.formats import all_layers
from loftq_cli.report.html import svg
from loftq_cli.report.html.figure import MOST_SERIES, Figure, numbers, size
from loftq_cli.report.html.svg import Axis, Series
from loftq_cli.schema import PlainLayer, QuantizeResults, RequantizedLayer


def _place(module: str) -> tuple[str, int | None]:
    """(what a layer is in its block, the block's number)."""
    found = re.match(r"(?:.*?\.)?(\d+)\.(.+)", module)
    return (module, None) if found is None else (found[2], int(found[1]))


def quantize_figures(results: QuantizeResults) -> Iterator[Figure]:
    layers = all_layers(results)
    if results.layers and not results.dry_run:
        outputs = results.totals.output_error_relative is not None
        key = "output_error_relative" if outputs else "weight_error_relative"
        what = "output" if outputs else "weight"
        wants = "a dark row wants a higher rank, or more bits"
        if results.distillation is not None:
            wants = "the training after the start did not look at this"
        yield from _by_depth(
            f"{what.capitalize()} error by layer, with the adapter",
            {each.name: getattr(each, key) for each in layers},
            units.percent,
            f"Darker cells lose more; {wants}.",
        )
        yield from _curves(results)
    if results.merged is not None:
        yield from requantizing_errors(results.without_adapter)
    for attribute, name in (("bits", "Bits"), ("rank", "Rank")):
        found = {each.name: getattr(each, attribute, None) for each in layers}
        if len({value for value in found.values() if value is not None}) > 1:
            yield from _by_depth(
                f"{name} by layer",
                found,
                units.plain,
                f"{name} that differ were chosen by what every layer would lose.",
            )
    yield _bytes(results)


def requantizing_errors(layers: Sequence[PlainLayer | RequantizedLayer]) -> Iterator[Figure]:
    """Of merged weights whose adapter is in them."""
    yield from _by_depth(
        "Weight error of quantizing again by layer",
        {each.name: each.weight_error_relative for each in layers},
        units.percent,
        "Darker cells lose more of what was trained; with more bits, or the adapter beside the "
        "model instead, less is lost.",
    )


def _by_depth(
    title: str, found: Mapping[str, float | None], show: svg.Show, note: str
) -> Iterator[Figure]:
    values: dict[tuple[str, str], float] = {}
    for module, value in found.items():
        if value is not None:
            kind, depth = _place(module)
            values[kind, "–" if depth is None else str(depth)] = value
    if not values:
        return
    kinds = list(dict.fromkeys(kind for kind, _ in values))
    depths = sorted(
        dict.fromkeys(depth for _, depth in values),
        key=lambda each: int(each) if each != "–" else -1,
    )
    rows = [
        [kind, *(show(values[kind, d]) if (kind, d) in values else "" for d in depths)]
        for kind in kinds
    ]
    yield Figure(
        title,
        svg.heat(f"{title}: kinds of layers by block", kinds, depths, values, show),
        note,
        numbers(["layer", *depths], rows, title),
    )


def _curves(results: QuantizeResults) -> Iterator[Figure]:
    groups: dict[str, list[list[float]]] = {}
    for layer in results.layers:
        if len(layer.error_curve) > 1 and layer.error_curve[0]:
            groups.setdefault(_place(layer.name)[0], []).append(layer.error_curve)
    series, rows = [], []
    for kind, curves in list(groups.items())[:MOST_SERIES]:
        length = max(map(len, curves))
        # A layer that stopped earlier stays where it is.
        means = [
            sum(curve[min(i, len(curve) - 1)] / curve[0] for curve in curves) / len(curves)
            for i in range(length)
        ]
        series.append(Series(kind, [(i + 1.0, mean) for i, mean in enumerate(means)]))
        rows.append([kind, length, units.percent(means[-1])])
    if series:
        title = "Error by iteration"
        yield Figure(
            title,
            svg.lines(
                f"{title}, a share of that after the first",
                series,
                Axis("iteration", units.plain),
                Axis("of the first", units.percent),
            ),
            "Means by kind of layer; where a line is flat, more iterations buy nothing.",
            numbers(("layer", "iterations", "last, of the first"), rows, title),
        )


def _bytes(results: QuantizeResults) -> Figure:
    totals = results.totals
    left = sum(each.bytes for each in results.untouched)
    parts = ("linear layers", "left as it was", "adapter")
    rows = [
        ("before", (totals.input_bytes - left, left, 0)),
        ("now", (totals.output_bytes - left, left, totals.adapter_bytes)),
    ]
    title = "Bytes by part"
    return Figure(
        title,
        svg.stacked(title, parts, rows, size),
        "What is left as it was (embeddings, norms) limits what fewer bits can save.",
        numbers(("", *parts), [[name, *map(size, values)] for name, values in rows], title),
    )
