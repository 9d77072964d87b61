"""What the numbers of result documents say. Every sentence stands on figures that it names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from loftq_cli import starts
from loftq_cli.report import distilled, units
from loftq_cli.report.checks import FASTER, check_findings, verify_findings
from loftq_cli.report.formats import all_layers, error_changes, rank_range
from loftq_cli.report.parts import Rules, remark, remarks
from loftq_cli.schema import (
    Document,
    ExportResults,
    GenerateResults,
    LoadResults,
    MergeResults,
    PushResults,
    QuantizeResults,
    Remark,
    SweepRanksResults,
    TargetsResults,
)


def findings(documents: Sequence[Document[Any]]) -> list[Remark]:
    """Every document's findings in turn, then those that take two documents."""
    return [*remarks(documents, _FINDINGS), *_adapter_costs(documents)]


def _load(document: Document[LoadResults]) -> Iterator[str]:
    results = document.results
    read = document.timings_seconds.get("read")
    if read:
        rate = units.size(round(results.parameter_bytes / read))
        share = units.percent(read / results.load_seconds) if results.load_seconds else "all"
        yield f"reading the weights is {share} of loading, at {rate} a second"
    memory = document.environment.memory_bytes
    if memory:
        yield (
            f"loading takes {units.percent(results.peak_memory_bytes / memory)} of this box's "
            f"{units.size(memory)} of memory at its peak"
        )
    if results.quantized_layers:
        share = units.percent(results.parameter_bytes / (2 * results.parameters))
        yield (
            f"{units.plural(results.quantized_layers, 'quantized layer')} bring "
            f"{units.number(results.parameters)} parameters into "
            f"{units.size(results.parameter_bytes)}, {share} of their size in 16 bits, "
            "adapter included"
        )


def _generate(document: Document[GenerateResults]) -> Iterator[str]:
    results = document.results
    rates = sorted(results.generations, key=lambda each: each.tokens_per_second)
    slowest, fastest = rates[0], rates[-1]
    if slowest.tokens_per_second * FASTER < fastest.tokens_per_second:
        yield (
            f"the slowest of {len(rates)} prompts ({_short(slowest.prompt)}) runs at "
            f"{units.significant(slowest.tokens_per_second)} tokens/s, the fastest "
            f"({_short(fastest.prompt)}) at {units.significant(fastest.tokens_per_second)}"
        )
    ended = [each for each in results.generations if each.new_tokens < results.max_new_tokens]
    if ended:
        yield (
            f"{len(ended)} of {units.plural(len(rates), 'text')} ended before the "
            f"{results.max_new_tokens} tokens that were asked for"
        )


def _quantize(document: Document[QuantizeResults]) -> Iterator[str]:
    results, totals = document.results, document.results.totals
    # A training after the start did not look at weights, whose error is all that is known then.
    aimed = results.distillation is None
    if aimed:
        yield from _error_changes(results)
    yield from distilled.finding(results)
    layers = results.layers
    what = "output" if totals.output_error_relative is not None else "weight"
    errors = [(getattr(layer, f"{what}_error_relative") or 0.0, layer.name) for layer in layers]
    error, name = max(errors, key=lambda each: each[0], default=(0.0, ""))
    if aimed and len(errors) > 1 and error > 0:
        yield f"the most {what} error is left in {name}: {units.percent(error)}"
    times = {layer.name: layer.seconds for layer in layers if layer.seconds}
    if len(times) > 1:
        slowest = max(times, key=lambda name: times[name])
        spent = times[slowest]
        yield (
            f"the slowest of {len(times)} layers is {slowest}: {units.seconds(spent)}, "
            f"{units.percent(spent / sum(times.values()))} of the time of all"
        )
    yield from _best_iterates(results)
    if results.untouched:
        share = sum(tensor.share_of_bytes for tensor in results.untouched)
        largest = max(results.untouched, key=lambda tensor: tensor.bytes)
        yield (
            f"{units.percent(share)} of the bytes stay as they were, the most of it "
            f"{largest.name} ({units.percent(largest.share_of_bytes)}: {largest.reason})"
        )
    yield from _spread(results)
    bits = 8 * totals.output_bytes / totals.parameters
    if results.merged is None:
        adapter = units.percent(totals.adapter_bytes / totals.output_bytes)
        more = f"the adapter adds {adapter} to its size"
    else:
        error = units.percent(totals.weight_error_relative or 0.0)
        more = f"quantizing again changed the merged weights by {error}"
    each = units.significant(bits)
    yield f"the backbone has {each} bits a parameter, all tensors counted; {more}"


def _error_changes(results: QuantizeResults) -> Iterator[str]:
    """Of plain quantization's error, by backbone and adapter together."""
    settings = results.settings
    changes = error_changes(results) if starts.of_report(settings.init).corrects else []
    for what, before, after in changes:
        if before:
            whose = "the weights" if what == "weight error" else "the layers' outputs"
            share = units.removed(before, after)
            does = f"take away {units.percent(share)} of" if share >= 0 else "add to"
            text = (
                f"backbone and adapter together {does} the error that plain quantization makes in "
                f"{whose}: {units.percent(before)} becomes {units.percent(after)}"
            )
            if share < 0 and what == "weight error" and settings.calibration is not None:
                text += " (this start was fitted to outputs, not to weights)"
            yield text


def _spread(results: QuantizeResults) -> Iterator[str]:
    """Where bits and ranks went, if that was measured first."""
    layers = all_layers(results)
    counts = Counter(layer.bits for layer in layers if layer.bits is not None)
    if len(counts) > 1:
        each = ", ".join(f"{bits} bits in {counts[bits]}" for bits in sorted(counts, reverse=True))
        yield f"of {units.plural(len(layers), 'layer')}: {each}"
    low, high = rank_range(results)
    if low < high:
        most = max(results.layers, key=lambda layer: layer.rank or 0)
        yield f"ranks go from {low} to {high}, the highest in {most.name}"


def _best_iterates(results: QuantizeResults) -> Iterator[str]:
    if results.settings.iterations is None:  # it was left to each layer how long to go on
        counts = sorted(len(layer.error_curve) for layer in results.layers)
        if counts and counts[-1] > 1:
            which = f"{counts[0]} to {counts[-1]}" if counts[0] < counts[-1] else f"{counts[0]}"
            yield f"how many iterations pay was left to each layer: {which}"
        return
    iterated = [layer for layer in results.layers if len(layer.error_curve) > 1]
    early = [layer for layer in iterated if (layer.best_iteration or 0) < len(layer.error_curve)]
    if early:
        often = Counter(layer.best_iteration for layer in early).most_common(1)[0][0]
        names = ", ".join(layer.name for layer in early[:3])
        more = f" and {len(early) - 3} more" if len(early) > 3 else ""
        yield (
            f"in {len(early)} of {units.plural(len(iterated), 'layer')} an iterate before the last "
            f"is the best, most often number {often}: {names}{more}"
        )
    elif iterated:
        yield f"the last iterate is the best one in all {len(iterated)} layers"


def _sweep_ranks(document: Document[SweepRanksResults]) -> Iterator[str]:
    results = document.results
    yield results.verdict.sentence
    vram = results.settings.vram_bytes
    if vram is not None:
        ranks = ", ".join(str(each.rank) for each in results.ranks if each.fits) or "none"
        yield f"ranks that fit into {units.size(vram)} of GPU memory, all activations kept: {ranks}"
    least, most = results.ranks[0], results.ranks[-1]
    if len(results.ranks) > 1:
        adapter = units.significant(most.adapter_bytes / least.adapter_bytes)
        memory = units.significant(most.memory.total_bytes / least.memory.total_bytes)
        yield (
            f"going from rank {least.rank} to {most.rank} multiplies the adapter by {adapter} and "
            f"the memory to fine-tune by {memory}"
        )


def _targets(document: Document[TargetsResults]) -> Iterator[str]:
    results = document.results
    if results.layers:
        largest = max(results.layers, key=lambda kind: kind.parameters)
        yield (
            f"{largest.name} holds the most of the model: "
            f"{units.percent(largest.share_of_parameters)} of its parameters in "
            f"{units.plural(largest.count, 'layer')}"
        )
    cheapest = min(
        (preset for preset in results.presets if preset.modules),
        key=lambda preset: preset.trainable_parameters,
        default=None,
    )
    dearest = max(results.presets, key=lambda preset: preset.trainable_parameters, default=None)
    if cheapest and dearest and cheapest.trainable_parameters < dearest.trainable_parameters:
        share = cheapest.trainable_parameters / dearest.trainable_parameters
        yield (
            f"of the presets, {cheapest.name} is the smallest: {units.percent(share)} of the "
            f"parameters that {dearest.name} trains"
        )
    if results.skipped:
        skipped = sum(each.share_of_parameters for each in results.skipped)
        most = max(results.skipped, key=lambda each: each.parameters)
        yield (
            f"{units.percent(skipped)} of the parameters get no adapter, the most of them "
            f"{most.name} ({most.reason})"
        )


def _adapter_costs(documents: Sequence[Document[Any]]) -> Iterator[Remark]:
    """Generation of one model on one device, with and without an adapter."""

    def place(run: Document[GenerateResults]) -> tuple[str | None, str, str]:
        model = None if run.model is None else run.model.id
        return model, run.results.device, run.results.dtype

    runs = [document for document in documents if document.command == "generate"]
    plain = {place(run): run.results for run in runs if run.results.adapter is None}
    for run in runs:
        if run.results.adapter is not None and place(run) in plain:
            before = plain[place(run)].average_tokens_per_second
            text = (
                f"with the adapter {run.results.adapter} generation runs at "
                f"{units.significant(run.results.average_tokens_per_second)} tokens/s, without one "
                f"at {units.significant(before)}"
            )
            yield remark(run, text)


def _export(document: Document[ExportResults]) -> Iterator[str]:
    results = document.results
    bits, former = units.plain(results.stored_bits), units.plain(results.source_stored_bits)
    yield (
        f"the same codes take {bits} bits a weight in {results.container}, and {former} in "
        f"{results.source_container}: {results.output} and {results.source} are the same model"
    )


def _merge(document: Document[MergeResults]) -> Iterator[str]:
    results = document.results
    times = units.significant(results.output_bytes / max(results.input_bytes, 1))
    if (again := results.requantized) is not None:
        yield (
            f"{results.output} has no adapter: it is in the weights, which were quantized again to "
            f"{units.plain(again.stored_bits)} bits in {again.container}; that changed them by "
            f"{units.percent(again.weight_error_relative)}"
        )
        worst = max(again.layers, key=lambda layer: layer.weight_error_relative)
        yield (
            f"the most error is in {worst.name}: {units.percent(worst.weight_error_relative)}; "
            f"outputs deviate by up to {units.percent(results.output_deviation)} from those of the "
            "adapted layers"
        )
        return
    yield (
        f"{units.plural(results.merged_layers, 'layer')} of {results.output} have the adapter in "
        f"their weights, in {results.dtype}: it takes {times} times the bytes of {results.source}"
    )


def _push(document: Document[PushResults]) -> Iterator[str]:
    results = document.results
    who = "only its owners see it" if results.private else "everyone sees it"
    yield (
        f"{results.directory} is at {results.url}, {units.size(results.bytes)} in commit "
        f"{results.commit}; {who}"
    )


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 30 else f"{prompt[:27]}...")


_FINDINGS: Rules = {
    "check": check_findings,
    "verify": verify_findings,
    "export": _export,
    "merge": _merge,
    "push": _push,
    "load": _load,
    "generate": _generate,
    "quantize": _quantize,
    "sweep-ranks": _sweep_ranks,
    "targets": _targets,
    "compare": lambda document: [document.results.verdict.sentence],
}
