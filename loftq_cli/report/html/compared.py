"""Starts side by side: their distances, their losses, what they buy for their bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loftq_cli.report import units
from loftq_cli.report.html import svg
from loftq_cli.report.html.figure import MOST_SERIES, Figure, bars, numbers, size
from loftq_cli.report.html.svg import Axis, Series
from loftq_cli.report.stored_bits import called
from loftq_cli.report.task_verdict import first_scores, shown
from loftq_cli.schema import ComparedMethod, CompareResults


def compare_figures(results: CompareResults) -> Iterator[Figure]:
    groups: dict[str, list[ComparedMethod]] = {}
    for method in results.methods:
        if method.init != "original":
            groups.setdefault(_grid(method), []).append(method)
    for name, methods in groups.items():
        for what, key, show in (
            ("KL to the original", "kl_divergence", units.small),
            ("Perplexity", "perplexity", units.significant),
        ):
            found = [(m, value) for m in methods if (value := getattr(m, key)) is not None]
            if len(found) > 1:
                rows = [(_method(m), value, show(value)) for m, value in found]
                least = min(rows, key=lambda row: row[1])[0]
                yield bars(f"{what}, {name}", rows, ("start", what), "Lower is nearer.", least)
        yield from _losses(name, methods)
        yield from _scores(name, [results.methods[0], *methods])
    yield from _against_bytes(results.methods)


def _grid(method: ComparedMethod) -> str:
    if method.grid is None:
        return f"{method.bits} bits"
    return called(method.grid, method.container, method.block_size, method.experts)


def _method(method: ComparedMethod) -> str:
    return method.init if method.rank is None else f"{method.init} r{method.rank}"


def _losses(name: str, methods: Sequence[ComparedMethod]) -> Iterator[Figure]:
    trained = [each for each in methods if any(p.train_loss for p in each.loss_curve)]
    if not trained:
        return
    series = [
        Series(_method(m), [(p.step, p.train_loss) for p in m.loss_curve if p.train_loss])
        for m in trained[:MOST_SERIES]
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
        numbers(("start", "held-out before", "after"), shown, title),
    )


def _scores(name: str, methods: Sequence[ComparedMethod]) -> Iterator[Figure]:
    """What each task is judged by, before and after training, below that of the original."""
    for task, first in first_scores(methods[0]).items():
        rows = [
            (f"{_method(method)}{', trained' if trained else ''}", score.value, shown(score))
            for method in methods
            for trained in (False, True)
            if (score := first_scores(method, trained).get(task)) and score.value is not None
        ]
        what = first.metric if first.filter is None else f"{first.metric}, {first.filter}"
        note = "Lower is better." if first.higher_is_better is False else "Higher is better."
        yield bars(f"{task}, {name}", rows, ("start", what), f"{what}. {note}")


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
        for start in list(starts)[:MOST_SERIES]
    ]
    title = "KL against stored bytes"
    yield Figure(
        title,
        svg.lines(title, series, Axis("backbone", size), Axis("KL", units.small, log=True)),
        "Down and to the left is better.",
        numbers(
            ("start", "grid", "backbone", "KL"),
            [
                [
                    _method(m),
                    _grid(m),
                    size(m.backbone_bytes),
                    units.small(m.kl_divergence or 0),
                ]
                for m in found
            ],
            title,
        ),
    )
