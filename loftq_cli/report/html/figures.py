"""What of a result document is drawn: a list of figures for every command, each with its table."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from loftq_cli.report import units
from loftq_cli.report.formats import all_layers
from loftq_cli.report.html import svg
from loftq_cli.report.html.svg import Axis, Series
from loftq_cli.report.tables import Column, Table
from loftq_cli.schema import (
    CheckResults,
    ComparedMethod,
    CompareResults,
    Document,
    GenerateResults,
    LoadResults,
    QuantizeResults,
    SweepRanksResults,
    TargetsResults,
)

# Lines in one picture that can still be told apart.
_MOST_SERIES = 6


@dataclass(frozen=True)
class Figure:
    """A picture, one sentence on how to read it, and its numbers."""

    title: str
    picture: str
    note: str
    table: Table


def figures_of(document: Document[Any]) -> list[Figure]:
    """The pictures of a document; of some commands there are none."""
    draw = _FIGURES.get(document.command)
    return [] if draw is None else [each for each in draw(document.results) if each.picture]


def _rows(keys: Sequence[str], rows: Sequence[Sequence[Any]], title: str) -> Table:
    """A table of what was drawn; the first column names the row."""
    columns = [
        Column(itemgetter(at), key, "number" if at else "name") for at, key in enumerate(keys)
    ]
    return Table(title, columns, rows)


def _place(module: str) -> tuple[str, int | None]:
    """(what a layer is in its block, the block's number)."""
    found = re.match(r"(?:.*?\.)?(\d+)\.(.+)", module)
    return (module, None) if found is None else (found[2], int(found[1]))


# --- quantize ------------------------------------------------------------------------------------


def _quantize(results: QuantizeResults) -> Iterator[Figure]:
    layers = all_layers(results)
    if results.layers and not results.dry_run:
        outputs = results.totals.output_error_relative is not None
        key = "output_error_relative" if outputs else "weight_error_relative"
        what = "output" if outputs else "weight"
        yield from _by_depth(
            f"{what.capitalize()} error by layer, with the adapter",
            {each.name: getattr(each, key) for each in layers},
            units.percent,
            "Darker cells lose more; a dark row wants a higher rank, or more bits.",
        )
        yield from _curves(results)
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
        _rows(["layer", *depths], rows, title),
    )


def _curves(results: QuantizeResults) -> Iterator[Figure]:
    groups: dict[str, list[list[float]]] = {}
    for layer in results.layers:
        if len(layer.error_curve) > 1 and layer.error_curve[0]:
            groups.setdefault(_place(layer.name)[0], []).append(layer.error_curve)
    series, rows = [], []
    for kind, curves in list(groups.items())[:_MOST_SERIES]:
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
            _rows(("layer", "iterations", "last, of the first"), rows, title),
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
        svg.stacked(title, parts, rows, _size),
        "What is left as it was (embeddings, norms) limits what fewer bits can save.",
        _rows(("", *parts), [[name, *map(_size, values)] for name, values in rows], title),
    )


def _size(value: float) -> str:
    return units.size(round(value))


# --- sweep-ranks, targets ------------------------------------------------------------------------


def _sweep_ranks(results: SweepRanksResults) -> Iterator[Figure]:
    ranks, best = results.ranks, results.verdict.recommended_rank
    lines = [
        Series(what, [(each.rank, value) for each in ranks if (value := getattr(each, key))])
        for what, key in (
            ("weight error", "weight_error_relative"),
            ("output error", "output_error_relative"),
        )
    ]
    lines = [each for each in lines if each.points]
    if lines:
        knee = next(((x, y, f"rank {best}") for x, y in lines[-1].points if x == best), None)
        title = "Error against rank"
        yield Figure(
            title,
            svg.lines(
                title,
                lines,
                Axis("rank", units.plain, log=True),
                Axis("error", units.percent),
                knee,
            ),
            results.verdict.sentence,
            _rows(
                ("rank", *(each.name for each in lines)),
                [
                    [str(x), *(units.percent(dict(each.points)[x]) for each in lines)]
                    for x, _ in lines[0].points
                ],
                title,
            ),
        )
    title = "Trainable parameters against rank"
    rows = [
        (
            f"rank {each.rank}",
            float(each.trainable_parameters),
            units.number(each.trainable_parameters),
        )
        for each in ranks
    ]
    yield Figure(
        title,
        svg.bars(title, rows, None if best is None else f"rank {best}"),
        f"Of {units.number(results.base_parameters)} in all.",
        _rows(
            ("rank", "trainable", "of all"),
            [
                [
                    str(each.rank),
                    units.number(each.trainable_parameters),
                    units.percent(each.trainable_percent / 100),
                ]
                for each in ranks
            ],
            title,
        ),
    )
    yield _memory(results)


_MEMORY = {
    "weights": ("weights_bytes", "absmax_bytes"),
    "16-bit rest": ("unquantized_bytes",),
    "adapter": ("adapter_bytes", "gradients_bytes", "optimizer_bytes"),
    "activations": ("activations_bytes",),
    "other": ("logits_bytes", "workspace_bytes", "context_bytes"),
}


def _memory(results: SweepRanksResults) -> Figure:
    rows = [
        (
            f"rank {each.rank}",
            [sum(getattr(each.memory, key) for key in keys) for keys in _MEMORY.values()],
        )
        for each in results.ranks
    ]
    vram = results.settings.vram_bytes
    limit = None if vram is None else (float(vram), f"{units.size(vram)} of GPU memory")
    title = "Memory to fine-tune, by part"
    return Figure(
        title,
        svg.stacked(title, list(_MEMORY), rows, _size, limit),
        "An estimate with all activations kept; gradient checkpointing takes less.",
        _rows(
            ("rank", *_MEMORY, "all"),
            [[name, *map(_size, parts), _size(sum(parts))] for name, parts in rows],
            title,
        ),
    )


def _targets(results: TargetsResults) -> Iterator[Figure]:
    title = "Parameters by kind of layer"
    kinds = sorted(results.layers, key=lambda kind: -kind.parameters)
    yield _bars(
        title,
        [
            (each.name, each.share_of_parameters, units.percent(each.share_of_parameters))
            for each in kinds
        ],
        ("layer", "of all parameters"),
        "Where the model's parameters are.",
    )


def _bars(
    title: str,
    rows: Sequence[tuple[str, float, str]],
    keys: tuple[str, str],
    note: str,
    marked: str | None = None,
) -> Figure:
    table = _rows(keys, [[name, words] for name, _, words in rows], title)
    return Figure(title, svg.bars(title, rows, marked) if rows else "", note, table)


# --- compare -------------------------------------------------------------------------------------


def _compare(results: CompareResults) -> Iterator[Figure]:
    groups: dict[str, list[ComparedMethod]] = {}
    for method in results.methods:
        if method.init != "original":
            groups.setdefault(f"{method.bits} bits", []).append(method)
    for name, methods in groups.items():
        for what, key, show in (
            ("KL to the original", "kl_divergence", units.small),
            ("Perplexity", "perplexity", units.significant),
        ):
            found = [(m, value) for m in methods if (value := getattr(m, key)) is not None]
            if len(found) > 1:
                rows = [(_method(m), value, show(value)) for m, value in found]
                least = min(rows, key=lambda row: row[1])[0]
                yield _bars(f"{what}, {name}", rows, ("start", what), "Lower is nearer.", least)
        yield from _losses(name, methods)
    yield from _against_bytes(results.methods)


def _method(method: ComparedMethod) -> str:
    return method.init if method.rank is None else f"{method.init} r{method.rank}"


def _losses(name: str, methods: Sequence[ComparedMethod]) -> Iterator[Figure]:
    trained = [each for each in methods if any(p.train_loss for p in each.loss_curve)]
    if not trained:
        return
    series = [
        Series(_method(m), [(p.step, p.train_loss) for p in m.loss_curve if p.train_loss])
        for m in trained[:_MOST_SERIES]
    ]
    title = f"Training loss, {name}"
    shown = [
        [_method(m), *(_loss(getattr(m, f"heldout_loss_{when}")) for when in ("before", "after"))]
        for m in trained
    ]
    yield Figure(
        title,
        svg.lines(title, series, Axis("step", units.plain), Axis("loss", units.significant)),
        "Each start at its own best learning rate, the first seed; held-out losses are below.",
        _rows(("start", "held-out before", "after"), shown, title),
    )


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _against_bytes(methods: Sequence[ComparedMethod]) -> Iterator[Figure]:
    found = [m for m in methods if m.init != "original" and m.kl_divergence]
    if len({m.backbone_bytes for m in found}) < 2:
        return
    starts = dict.fromkeys(m.init for m in found)
    series = [
        Series(
            start,
            sorted((m.backbone_bytes, m.kl_divergence or 0.0) for m in found if m.init == start),
            joined=False,
        )
        for start in list(starts)[:_MOST_SERIES]
    ]
    title = "KL against stored bytes"
    yield Figure(
        title,
        svg.lines(title, series, Axis("backbone", _size), Axis("KL", units.small, log=True)),
        "Down and to the left is better.",
        _rows(
            ("start", "bits", "backbone", "KL"),
            [
                [
                    _method(m),
                    str(m.bits),
                    _size(m.backbone_bytes),
                    units.small(m.kl_divergence or 0),
                ]
                for m in found
            ],
            title,
        ),
    )


# --- what was tried on this box ------------------------------------------------------------------


def _check(results: CheckResults) -> Iterator[Figure]:
    tests = [test for test in results.tests if test.seconds > 0]
    slowest = sorted(tests, key=lambda test: -test.seconds)[:10]
    yield _bars(
        "Time by check",
        [(test.name, test.seconds, units.seconds(test.seconds)) for test in slowest],
        ("check", "time"),
        f"The longest of {units.plural(len(results.tests), 'check')}.",
    )


def _generate(results: GenerateResults) -> Iterator[Figure]:
    rows = [
        (each.prompt, each.tokens_per_second, f"{units.significant(each.tokens_per_second)}/s")
        for each in results.generations
    ]
    yield _bars("Tokens a second", rows, ("prompt", "tokens a second"), "By prompt, in turn.")


def _load(results: LoadResults) -> Iterator[Figure]:
    rows = [
        (name, float(count), units.size(count)) for name, count in results.bytes_by_dtype.items()
    ]
    yield _bars("Bytes by dtype", rows, ("dtype", "bytes"), "Of the loaded model's parameters.")


_FIGURES: Mapping[str, Callable[[Any], Iterator[Figure]]] = {
    "quantize": _quantize,
    "sweep-ranks": _sweep_ranks,
    "targets": _targets,
    "compare": _compare,
    "check": _check,
    "generate": _generate,
    "load": _load,
}
