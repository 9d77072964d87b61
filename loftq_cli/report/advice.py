"""What to do next, where the numbers of a box or a model call for something."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loftq_cli import starts
from loftq_cli.formats import DEFAULT_CONTAINER
from loftq_cli.options import QuantizeOptions, SweepOptions
from loftq_cli.report import units
from loftq_cli.report.checks import figures, hints
from loftq_cli.report.formats import all_layers, code_bits, error_changes, in_integers
from loftq_cli.report.parts import Rules, remarks
from loftq_cli.schema import (
    BitsVerdict,
    CheckResults,
    CompareResults,
    CompareSettings,
    Document,
    LoadResults,
    QuantizeResults,
    QuantizeSettings,
    Remark,
    SweepRanksResults,
    SweepSettings,
    TargetsResults,
)
from loftq_cli.starts import Start

# Speed-ups and savings below these are not worth a change.
_WORTH_A_DTYPE = 1.5
_WORTH_THREADS = 1.2
_WORTH_BYTES = 0.03
# An adapter that removes less than this share of the error hardly corrects anything.
_LITTLE = 0.2
# The last iteration took this much of the error away: another may do the same.
_STILL_FALLING = 0.01
# What the reader has to name.
_OUT, _FILE = Path("OUT"), Path("FILE")


def recommendations(documents: Sequence[Document[Any]]) -> list[Remark]:
    """Each once, in the order of the documents."""
    found: dict[str, Remark] = {}
    for each in remarks(documents, _ADVICE):
        found.setdefault(each.text, each)
    return list(found.values())


def _check(document: Document[CheckResults]) -> Iterator[str]:
    yield from hints(document)
    rates = figures(document, "matrix products")
    whole = rates.get("flops_per_second_float32")
    alone = rates.get("flops_per_second_float32_one_thread")
    if whole and alone and alone > _WORTH_THREADS * whole:
        yield (
            f"set OMP_NUM_THREADS=1 while this box is this busy: one thread is "
            f"{units.significant(alone / whole)} times as fast as {rates['threads']}"
        )
    yield from _dtype(document, rates)
    yield from _memory(document)


def _dtype(document: Document[CheckResults], rates: Mapping[str, Any]) -> Iterator[str]:
    """Another dtype, where the one in use is much slower than one that is as exact or nearly so."""
    resolved = document.resolved.get("dtype")
    used = None if resolved is None else resolved.value
    mine = rates.get(f"flops_per_second_{used}")
    speed = {
        dtype: rates.get(f"flops_per_second_{dtype}", 0.0) for dtype in ("float32", "bfloat16")
    }
    best = max(speed, key=lambda dtype: speed[dtype])
    if mine and speed[best] > _WORTH_A_DTYPE * mine:
        yield (
            f"compute with --dtype {best} on this box: its products are "
            f"{units.significant(speed[best] / mine)} times as fast as {used}'s"
        )


def _memory(document: Document[CheckResults]) -> Iterator[str]:
    """The largest rank whose fine-tuning fits into the GPU, or into memory where there is none."""
    environment = document.environment
    needs = [
        (row["rank"], int(row["memory_bytes"] or 0))
        for test in document.results.tests
        for row in test.rows
        if "memory_bytes" in row
    ]
    room, place = environment.memory_bytes, "this box's memory (it has no GPU)"
    if environment.accelerators:
        room, place = environment.accelerators[0].memory_bytes, environment.accelerators[0].name
    if not room or not needs:
        return
    fitting = [(rank, need) for rank, need in needs if need <= room]
    if fitting:
        rank, need = fitting[-1]
        every = "any rank" if len(fitting) == len(needs) else "ranks"
        yield (
            f"choose {every} up to {rank} for 4-bit fine-tuning: {units.size(need)} of the "
            f"{units.size(room)} of {place}, by the estimate for one sequence of 512 tokens"
        )
    else:
        rank, need = needs[0]
        yield (
            f"fine-tune on a larger box: rank {rank} needs {units.size(need)}, and {place} has "
            f"{units.size(room)}"
        )


def _load(document: Document[LoadResults]) -> Iterator[str]:
    results, environment = document.results, document.environment
    if results.quantization is not None or results.random_weights:
        return
    limit, place = environment.memory_bytes, "this box's"
    if environment.accelerators:
        limit, place = environment.accelerators[0].memory_bytes, "the GPU's"
    if limit and results.parameter_bytes > limit / 4:
        line = QuantizeOptions(model=_model(document), output=_OUT).command_line("model")
        share = units.percent(results.parameter_bytes / limit)
        yield (
            f"quantize before fine-tuning: the weights alone are {share} of {place} "
            f"{units.size(limit)} ({line})"
        )


def _quantize(document: Document[QuantizeResults]) -> Iterator[str]:
    results, totals, settings = document.results, document.results.totals, document.results.settings
    if results.merged is not None:
        return
    # A training after the start did not look at weights, whose error is all that is known then.
    changes = error_changes(results) if results.distillation is None else []
    if changes and starts.of_report(settings.init).corrects and settings.quant_type != "int8":
        what, before, after = changes[-1]  # the error of outputs, where that is known
        removed = units.removed(before, after)
        if before and removed < _LITTLE:
            only = f"takes away only {units.percent(removed)}" if removed > 0 else "takes nothing"
            line = SweepOptions.like(
                _own_numbers(settings),
                model=_model(document),
                error=True,
                calibration_text=_FILE if what == "output error" else None,
            )
            yield (
                f"see what a higher rank would buy: rank {settings.rank} {only} of the {what} "
                f"({line.command_line('model', 'error', 'calibration_text')})"
            )
    yield from _iterations(results)
    # One float32 scale a block, or one byte and a float32 for every 256 blocks.
    if settings.block_size and not settings.double_quant and not in_integers(results):
        quantized = sum(math.prod(layer.shape) for layer in all_layers(results))
        saved = round(quantized / settings.block_size * (4 - 1 - 4 / 256))
        if saved > _WORTH_BYTES * totals.output_bytes:
            yield (
                f"add --double-quant to save {units.size(saved)}, "
                f"{units.percent(saved / totals.output_bytes)} of the backbone"
            )


def _own_numbers(
    settings: QuantizeSettings | SweepSettings,
) -> Iterator[tuple[str, Any]]:
    """The settings without a `quant_type` that is the only one of its container."""
    only = settings.container != DEFAULT_CONTAINER
    return (each for each in settings if not (only and each[0] == "quant_type"))


def _iterations(results: QuantizeResults) -> Iterator[str]:
    asked = results.settings.iterations
    curves = [layer for layer in results.layers if len(layer.error_curve) > 1]
    if asked is None or not curves:
        return
    needed = max(layer.best_iteration or 1 for layer in curves)
    if needed < asked:
        yield (
            f"--iterations {needed} gives the same result in about "
            f"{units.percent(needed / asked)} of the time: no layer's best iterate comes later"
        )
        return
    gains = [1 - layer.error_curve[-1] / layer.error_curve[-2] for layer in curves]
    mean = sum(gains) / len(gains)
    if mean > _STILL_FALLING:
        yield (
            f"try --iterations {2 * asked}: the last one still took {units.percent(mean)} of the "
            "error away"
        )


def _sweep_ranks(document: Document[SweepRanksResults]) -> Iterator[str]:
    results = document.results
    settings, rank = results.settings, results.verdict.recommended_rank
    usual = settings.bits == SweepOptions.bits
    if rank is not None:
        changed: dict[str, Any] = {"bits": None if usual else settings.bits}
        if not results.quantized_parameters:
            changed = {"bits": None, "init": starts.LORA.name}
        if settings.calibration is not None:
            changed |= {"init": starts.CALIBRATED.name, "calibration_text": _FILE}
        changed |= {"model": _model(document), "rank": rank, "output": _OUT}
        yield QuantizeOptions.like(_own_numbers(settings), **changed).command_line(
            "model", "bits", "rank"
        )
    elif settings.bits > SweepOptions.bits:
        yield f"hold the backbone in 4 bits: at {settings.bits} no rank fits"
    elif results.ranks[0].fits_with_checkpointing:
        need = units.size(results.ranks[0].memory.total_with_checkpointing_bytes)
        yield f"train with gradient checkpointing: rank {results.ranks[0].rank} then needs {need}"


def _compare(document: Document[CompareResults]) -> Iterator[str]:
    """The start that gains on each grid: after training, or else by its distance."""
    settings = document.results.settings
    for best in document.results.verdict.bits:
        init, rank, gain, trained = best.init, best.rank, best.gain, ""
        if settings.train_steps is not None:
            init, rank = best.trained_init or init, best.trained_rank or rank
            gain = best.trained_gain is True
            if best.trained_learning_rate is not None:
                rate = f"{best.trained_learning_rate:g}"
                trained = f" (it trained best at a learning rate of {rate})"
        if gain:
            line = QuantizeOptions.like(
                _for_start(settings, starts.of_report(init), best),
                model=_model(document),
                bits=best.bits,
                container=best.container,
                rank=rank,
                init=init,
                output=_OUT,
            )
            yield line.command_line("model", "bits", "rank", "init", "calibration_text") + trained


def _for_start(
    settings: CompareSettings, start: Start, best: BitsVerdict
) -> Iterator[tuple[str, Any]]:
    """Of the settings that all starts were asked to have, those that mean something to this one."""
    own = best.container == DEFAULT_CONTAINER and best.bits <= code_bits(settings.quant_type)
    for name, value in settings:
        if name == "calibration_text":
            if start.needs_moments:
                yield name, _FILE if value in (None, "built-in") else Path(value)
        elif name == "block_size":
            if own or best.block_size is not None:
                yield name, best.block_size or value
        elif name in ("quant_type", "double_quant"):
            if own:
                yield name, value
        elif name == "experts":
            yield name, best.experts
        elif name != "iterations" or start.iterates:
            yield name, value


def _model(document: Document[Any]) -> str:
    return "MODEL" if document.model is None else document.model.id


def _targets(document: Document[TargetsResults]) -> Iterator[str]:
    results = document.results
    if results.guessed:
        names = ", ".join(results.guessed)
        yield f"look at {names} before using a preset: only their place says what they are for"


_ADVICE: Rules = {
    "check": _check,
    "verify": hints,
    "load": _load,
    "quantize": _quantize,
    "sweep-ranks": _sweep_ranks,
    "targets": _targets,
    "compare": _compare,
}
