"""What `quantize` wrote: a summary, one row per kind of layer, and how to go on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from loftq_cli.report import distilled, units
from loftq_cli.report.escape import shell_word
from loftq_cli.report.experts import adapters_told, told
from loftq_cli.report.formats import (
    ERRORS,
    adapter_of,
    bits_a_weight,
    error_changes,
    is_quantized,
    number_type,
)
from loftq_cli.report.integer_card import GPTQ, export_line, install_lines
from loftq_cli.report.loading import (
    adapter_lines,
    can_take_adapter,
    import_lines,
    load_lines,
    own_experts,
    quoted,
)
from loftq_cli.report.parts import TOLD_BY
from loftq_cli.report.sparks import bar, curve
from loftq_cli.report.tables import Code, Column, Facts, Records, Section, Table, View
from loftq_cli.schema import AdaptedLayer, Document, PlainLayer, QuantizeResults, UntouchedTensor

_Item = TypeVar("_Item")

# So many kinds of untouched tensors are named on a page; the document names every tensor.
_NAMED_KINDS = 8
# So many layers with the least error are named at the end, and as many with the most.
_EXTREMES = 3


class _Group(NamedTuple):
    """Layers of one kind that have the same shape, and more in common."""

    kind: str
    layers: Sequence[Any]


_GROUP_COLUMNS = (
    Column("kind", "layer", "name"),
    Column(lambda group: len(group.layers), "count", show=units.number),
    Column(lambda group: group.layers[0].shape, "out × in", show=units.shape),
)


def quantize_view(document: Document[QuantizeResults]) -> View:
    results = document.results
    source = document.model.id if document.model is not None else "the model"
    done = "Dry run" if results.dry_run else f"Wrote {results.output}"
    title = f"{done}: {source} in {number_type(results)} with {adapter_of(results)}"
    sections: list[Section] = [Facts([*_facts(results), *_memory_plan(document)])]
    if results.layers:
        sections += _adapted(results)
    if results.without_adapter:
        sections.append(_without_adapter(results))
    if results.untouched:
        sections.append(_untouched(results.untouched))
    if not results.dry_run:
        sections += [_snippet(results), *_best_and_worst(results)]
    return View(title, sections, _records(results))


def _facts(results: QuantizeResults) -> list[tuple[str, str]]:
    totals = results.totals
    about = "about " if results.dry_run else ""
    kept = units.percent(totals.output_bytes / max(totals.input_bytes, 1))
    sizes = f"{units.size(totals.input_bytes)} → {about}{units.size(totals.output_bytes)}"
    facts = [("backbone", f"{sizes} ({kept} of it)")]
    bits = bits_a_weight(results)
    if bits is not None:
        facts.append(("precision", bits))
    if results.experts is not None:
        facts.append(("experts", told(results.experts)))
    if (adapters := results.expert_adapters) is not None:
        facts.append(("on experts", adapters_told(adapters, totals.trainable_parameters)))
    if results.merged is None:
        trainable = units.plural(totals.trainable_parameters, "trainable parameter")
        facts.append(("adapter", f"{about}{units.size(totals.adapter_bytes)}, {trainable}"))
    else:
        facts.append(("merged", f"{results.merged.adapter} into {results.merged.source}"))
        facts.append(("weight error", units.percent(totals.weight_error_relative or 0.0)))
    if results.streamed_from is not None:
        facts.append(("source", f"streamed from {results.streamed_from}, none kept on the disk"))
    if results.evened:
        alike = units.plural(len(results.evened), "group")
        facts.append(
            ("fused", f"{alike} of layers with the same bits, as servers hold them as one")
        )
    if results.counted_by == "names":
        facts.append(("told by", TOLD_BY["names"]))
    for what, before, after in error_changes(results):
        where = " on the calibration text" if what == "output error" else ""
        if where and results.settings.calibration_order == "sequential":
            where += ", in sequence"
        facts.append((what, units.error_change(before, after) + where))
    if (run := results.distillation) is not None:
        facts.append(("distilled", distilled.change(run)))
    if totals.seconds is not None:
        facts.append(("time", units.seconds(totals.seconds)))
    if totals.peak_memory_bytes is not None:
        facts.append(("peak memory", f"{about}{units.size(totals.peak_memory_bytes)}"))
    return facts


def _memory_plan(document: Document[QuantizeResults]) -> list[tuple[str, str]]:
    """How little was held at once, where that was asked for."""
    asked = any(word.startswith("--max-memory") for word in document.argv)
    resolved = document.resolved.get("memory_plan") if asked else None
    return [] if resolved is None else [("memory plan", f"{resolved.value} ({resolved.reason})")]


def _adapted(results: QuantizeResults) -> list[Table]:
    """The layers by kind: a table for each error that was measured, or one without."""
    changes = [] if results.dry_run else [what for what, *_ in error_changes(results)]
    return [_by_kind(results, what) for what in changes] or [_by_kind(results, None)]


def _by_kind(results: QuantizeResults, what: str | None) -> Table:
    layers = results.layers
    columns = [*_GROUP_COLUMNS]
    # What is the same for all stands in the title of the page.
    if len({layer.bits for layer in layers}) > 1:
        columns.append(Column(lambda group: group.layers[0].bits, "bits"))
    if len({layer.rank for layer in layers}) > 1:
        columns.append(Column(_ranks, "rank"))
    title = "Layers that get an adapter"
    if what is not None:
        before, after = (partial(_mean, key) for key in ERRORS[what])

        def removed(group: _Group) -> float | None:
            errors = before(group), after(group)
            return None if None in errors else units.removed(*errors)

        columns += [
            Column(before, "quantized", show=units.percent),
            Column(after, "+ adapter", show=units.percent),
            Column(removed, "removed", show=units.percent),
            Column(_mean_curve, "by iteration", "picture", curve),
        ]
        title = f"Mean {what} by kind of layer"
    return Table(title, columns, _by_shape(layers, lambda layer: layer.bits))


def _mean(key: str, group: _Group) -> Any:
    values = [getattr(layer, key) for layer in group.layers]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _mean_curve(group: _Group) -> list[float]:
    """Of the weights' error, iteration after iteration; a layer that stopped stays where it was."""
    curves = [layer.error_curve for layer in group.layers if layer.error_curve]
    longest = max(map(len, curves), default=0)
    return [sum(each[min(i, len(each) - 1)] for each in curves) for i in range(longest)]


def _best_and_worst(results: QuantizeResults) -> Iterator[Table]:
    """The layers that backbone and adapter leave nearest to the original, and farthest."""
    changes = error_changes(results)
    if not changes or len(results.layers) <= 2 * _EXTREMES:
        return
    what = changes[-1][0]  # the error of outputs, where that is known
    before, after = ERRORS[what]
    ordered = sorted(results.layers, key=lambda layer: getattr(layer, after) or 0.0)
    worst = max(getattr(ordered[-1], after) or 0.0, 1e-30)
    columns = [
        Column("name", "layer", "name"),
        Column(before, "quantized", show=units.percent),
        Column(after, "+ adapter", show=units.percent),
        Column(lambda layer: getattr(layer, after) / worst, "", "picture", bar),
    ]
    chosen = [*ordered[:_EXTREMES], *ordered[-_EXTREMES:]]
    yield Table(f"Least and most {what} of {len(ordered)} layers", columns, chosen)


def _ranks(group: _Group) -> int | str | None:
    found = {layer.rank for layer in group.layers if layer.rank is not None}
    if len(found) < 2:
        return found.pop() if found else None
    return f"{min(found)} to {max(found)}"


def _without_adapter(results: QuantizeResults) -> Table:
    columns = [
        *_GROUP_COLUMNS,
        Column(lambda group: _share(group.layers), "of bytes", show=units.percent),
        Column(lambda group: group.layers[0].reason, "because", "prose"),
    ]
    how = "Quantized" if is_quantized(results) else "Left as it was"
    groups = _by_shape(results.without_adapter, lambda layer: layer.reason)
    return Table(f"{how} without an adapter", columns, groups)


def _untouched(tensors: Sequence[UntouchedTensor]) -> Table:
    def names(group: Sequence[UntouchedTensor]) -> str:
        kinds = list(dict.fromkeys(_suffix(tensor.name, 2) for tensor in group))
        more = len(kinds) - _NAMED_KINDS
        named = ", ".join(kinds[:_NAMED_KINDS])
        return named if more <= 0 else f"{named} and {units.plural(more, 'more kind')}"

    columns = [
        Column(names, "tensor", "name"),
        Column(len, "count", show=units.number),
        Column(lambda group: sum(tensor.bytes for tensor in group), "size", show=units.size),
        Column(_share, "of bytes", show=units.percent),
        Column(lambda group: group[0].reason, "because", "prose"),
    ]
    return Table("Left as it was", columns, _grouped(tensors, lambda tensor: tensor.reason))


def _share(tensors: Iterable[PlainLayer | UntouchedTensor]) -> float:
    return sum(tensor.share_of_bytes for tensor in tensors)


def _snippet(results: QuantizeResults) -> Code:
    if own_experts(results):
        place = shell_word(results.output)
        return Code("To try it (its README says why)", [f"loftq generate --model {place}"])
    if not can_take_adapter(results):
        return Code("To train it (its README says why)", [export_line(results.output, GPTQ)])
    place = quoted(results.output)
    return Code(
        "Load it",
        [
            *(f"# {line}" for line in install_lines(results)),
            *import_lines(results),
            *load_lines(results, place),
            *([] if results.merged is not None else adapter_lines(results, place)),
        ],
    )


def _records(results: QuantizeResults) -> Records:
    """Every tensor that the run decided about, one a line."""
    name, *others = (key for key in AdaptedLayer.model_fields if key != "error_curve")
    keys = [name, "treatment", *others, "reason"]
    plain = "quantized" if is_quantized(results) else "untouched"
    treated = (
        ("adapted", results.layers),
        (plain, results.without_adapter),
        ("untouched", results.untouched),
    )
    rows = [
        [treatment if key == "treatment" else getattr(item, key, None) for key in keys]
        for treatment, items in treated
        for item in items
    ]
    return Records(keys, rows)


def _by_shape(
    layers: Sequence[AdaptedLayer | PlainLayer], more: Callable[[Any], object]
) -> list[_Group]:
    """The layers by kind, shape and what ``more`` says of them.

    The kind is the end of a name, and more of it where shapes differ: GPT-2 calls two layers of a
    block `c_proj`, here they are `attn.c_proj` and `mlp.c_proj`.
    """
    shapes: dict[str, set[tuple[int, int]]] = {}
    for layer in layers:
        shapes.setdefault(_suffix(layer.name, 1), set()).add(layer.shape)

    def kind(layer: AdaptedLayer | PlainLayer) -> str:
        end = _suffix(layer.name, 1)
        return end if len(shapes[end]) == 1 else _suffix(layer.name, 2)

    groups = _grouped(layers, lambda layer: (kind(layer), layer.shape, more(layer)))
    return [_Group(kind(group[0]), group) for group in groups]


def _suffix(name: str, count: int) -> str:
    """The last parts of a dotted name; numbers only say which of many it is."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return ".".join(parts[-count:]) or name


def _grouped(items: Iterable[_Item], key: Callable[[_Item], object]) -> list[list[_Item]]:
    """Those with the same key together, in the order of the first ones."""
    groups: dict[object, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())
