"""What each rank would cost and buy, and where a model's parameters are."""

from __future__ import annotations

from collections.abc import Iterator

from loftq_cli.report import units
from loftq_cli.report.html import svg
from loftq_cli.report.html.figure import Figure, bars, numbers, size
from loftq_cli.report.html.svg import Axis, Series
from loftq_cli.schema import SweepRanksResults, TargetsResults


def sweep_ranks_figures(results: SweepRanksResults) -> Iterator[Figure]:
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
                Axis("rank", units.plain, log=True, ticks=[each.rank for each in ranks]),
                Axis("error", units.percent),
                knee,
            ),
            results.verdict.sentence,
            numbers(
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
        numbers(
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
        svg.stacked(title, list(_MEMORY), rows, size, limit),
        "An estimate with all activations kept; gradient checkpointing takes less.",
        numbers(
            ("rank", *_MEMORY, "all"),
            [[name, *map(size, parts), size(sum(parts))] for name, parts in rows],
            title,
        ),
    )


def targets_figures(results: TargetsResults) -> Iterator[Figure]:
    title = "Parameters by kind of layer"
    kinds = sorted(results.layers, key=lambda kind: -kind.parameters)
    yield bars(
        title,
        [
            (each.name, each.share_of_parameters, units.percent(each.share_of_parameters))
            for each in kinds
        ],
        ("layer", "of all parameters"),
        "Where the model's parameters are.",
    )
