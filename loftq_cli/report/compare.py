"""Starts side by side: how far each is from the original, what it costs, where training ends."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from loftq_cli.formats import DEFAULT_CONTAINER, WHOLE_ROW
from loftq_cli.report import units
from loftq_cli.report.formats import code_bits
from loftq_cli.report.parts import model_name
from loftq_cli.report.sparks import curve
from loftq_cli.report.tables import Column, Facts, Records, Section, Table, View
from loftq_cli.report.task_verdict import shown
from loftq_cli.report.units import listed
from loftq_cli.schema import (
    ComparedMethod,
    CompareResults,
    CompareSettings,
    Document,
    DownstreamTask,
    TaskScore,
)


def compare_view(document: Document[CompareResults]) -> View:
    results = document.results
    sections: list[Section] = [Facts(_facts(results)), _distances(results), _costs(results)]
    if results.verdict.grids:
        sections.append(_against_bytes(results))
    if results.settings.train_steps is not None:
        sections.append(_trained(results))
    sections += [_scores(results, task) for task in results.settings.tasks]
    sections.append(Facts([("verdict", results.verdict.sentence)]))
    # Curves, single runs and scores are in the JSON.
    lists = ("loss_curve", "runs", "scores", "trained_scores")
    keys = [key for key in ComparedMethod.model_fields if key not in lists]
    records = Records.of(results.methods, keys)
    return View(f"Starts for {model_name(document)}", sections, records)


def _facts(results: CompareResults) -> list[tuple[str, str]]:
    settings = results.settings
    tokens = units.number(settings.predicted_tokens)
    form = f"{settings.quant_type} in blocks of {settings.block_size}"
    if _has_grids(results):
        names = dict.fromkeys(each.grid for each in results.methods if each.grid)
        form = f"{', '.join(names)} in {', '.join(settings.containers)}"
    facts = [
        ("parameters", f"{units.number(results.base_parameters)} ({results.architecture})"),
        ("format", form + (", double quantized" if settings.double_quant else "")),
        ("targets", ", ".join(settings.target_modules)),
        ("evaluated on", f"{settings.text}: {tokens} tokens"),
    ]
    if settings.calibration_text is not None:
        facts.append(("calibrated on", settings.calibration_text))
    if settings.train_steps is not None:
        steps = units.plural(settings.train_steps, "step")
        batch = f"{settings.batch_windows} × {settings.window_tokens} tokens"
        facts.append(("trained on", f"{settings.train_text}: {steps} of {batch}"))
        facts.append(("trained with", ", ".join(_schedule(settings))))
    return facts


def _schedule(settings: CompareSettings) -> Iterator[str]:
    if settings.learning_rate is not None:
        yield f"learning rate {settings.learning_rate:g} for all"
    if (training := settings.training) is not None:
        if len(training.learning_rates) > 1:
            lowest, *_, highest = (f"{rate:g}" for rate in training.learning_rates)
            yield f"each start's best learning rate of {lowest} to {highest}"
        yield f"{training.lr_scheduler} decay"
        yield training.optimizer
        yield f"{units.plural(len(training.seeds), 'seed')} from {training.seeds[0]}"


def _distances(results: CompareResults) -> Table:
    columns = [
        Column("weight_error_relative", "error", show=units.percent),
        Column("error_removed", "removed", show=units.percent),
        Column("kl_divergence", "KL", show=units.small),
        Column("kl_gain", "to QLoRA", show=lambda value: f"{units.significant(value)} ×"),
        Column("perplexity", "perplexity", show=_perplexity),
    ]
    title = "Distance from the original (error: of the weights; removed: of QLoRA's)"
    return _table(results, title, columns, results.methods)


def _costs(results: CompareResults) -> Table:
    columns = [
        Column("backbone_bytes", "backbone", show=units.size),
        Column("adapter_bytes", "adapter", show=units.size),
        Column("seconds", "to make", show=units.seconds),
    ]
    return _table(results, "Cost", columns, results.methods[1:])


def _trained(results: CompareResults) -> Table:
    loss = "{:.4f}".format
    columns = [
        Column(_rate, "learning rate"),
        Column("heldout_loss_before", "before", show=loss),
        Column("heldout_loss_quarter", "at a quarter", show=loss),
        Column("heldout_loss_after", "after", show=loss),
        Column("heldout_loss_spread", "spread", show=loss),
        Column(lambda method: len(method.runs) or None, "runs"),
        Column("train_seconds", "training", show=units.seconds),
        Column(_losses, "training loss", "picture", curve),
    ]
    trained = [method for method in results.methods if method.heldout_loss_before is not None]
    title = "Held-out loss in nats a token, at each one's best learning rate"
    return _table(results, title, columns, trained)


def _scores(results: CompareResults, task: DownstreamTask) -> Table:
    """A column for each metric, and behind it one for what it is after training."""
    first = [score for score in results.methods[0].scores if score.task == task.name]
    columns = []
    for score in first:
        title = score.metric if score.filter is None else f"{score.metric} ({score.filter})"
        columns.append(Column(partial(_score, "scores", score), title, show=shown))
        if results.settings.train_steps is not None:
            columns.append(Column(partial(_score, "trained_scores", score), "trained", show=shown))
    title = f"{task.name} by lm-eval: {units.plural(task.questions, 'question')}"
    title += "" if task.shots is None else f", {task.shots}-shot"
    less = [score.metric for score in first if score.higher_is_better is False]
    title += f" ({listed(less)}: less is better)" if less else ""
    return _table(results, title, columns, results.methods)


def _score(key: str, like: TaskScore, method: ComparedMethod) -> TaskScore | None:
    named = ("task", "metric", "filter")
    same = (
        score
        for score in getattr(method, key)
        if all(getattr(score, name) == getattr(like, name) for name in named)
    )
    return next(same, None)


def _losses(method: ComparedMethod) -> list[float]:
    return [point.train_loss for point in method.loss_curve if point.train_loss is not None]


def _rate(method: ComparedMethod) -> str | None:
    if method.learning_rate is None:
        return "diverged" if method.runs else None
    marked = f" ({method.rate_at_end} tried)" if method.rate_at_end else ""
    return f"{method.learning_rate:g}{marked}"


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def _against_bytes(results: CompareResults) -> Table:
    columns = [
        Column("grid", "grid", "name"),
        Column("block_size", "block", show=_block),
        Column("container", "container"),
        Column("experts", "experts"),
        Column("stored_bits", "stored bits", show=units.plain),
        Column("backbone_bytes", "backbone", show=units.size),
        Column("data_free_kl", "data-free", show=units.small),
        Column("calibrated_kl", "calibrated", show=units.small),
        Column(lambda grid: "nearest for its bytes" if grid.least else None, ""),
    ]
    title = "KL by stored bits, the best start of each kind"
    return Table(title, columns, results.verdict.grids)


def _has_grids(results: CompareResults) -> bool:
    """Whether bits alone would not tell the formats apart."""
    forms = {(each.container, each.block_size) for each in results.methods if each.container}
    return len(forms) > 1 or any(container != DEFAULT_CONTAINER for container, _ in forms)


def _block(size: int) -> str:
    return "row" if size == WHOLE_ROW else str(size)


def _table(
    results: CompareResults, title: str, columns: list[Column], methods: list[ComparedMethod]
) -> Table:
    in_file = code_bits(results.settings.quant_type)
    bits = [Column("bits", "bits", show=lambda b: f"{b} in {in_file}" if b < in_file else str(b))]
    if _has_grids(results):
        bits = [
            Column(lambda method: method.grid or f"{method.bits} bits", "grid"),
            Column("block_size", "block", show=_block),
            Column("stored_bits", "stored bits", show=units.plain),
        ]
        if len(results.settings.containers) > 1:
            bits.insert(0, Column("container", "container"))
    if results.settings.experts:
        bits.append(Column("experts", "experts"))
    names = [Column("init", "start", "name"), *bits, Column("rank", "rank")]
    return Table(title, [*names, *columns], methods)
