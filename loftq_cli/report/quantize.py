"""What `quantize` wrote: a summary, one row per kind of layer, and how to go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from loftq_cli.report import units
from loftq_cli.report.formats import (
    ERRORS,
    adapter_of,
    bits_a_weight,
    error_changes,
    is_quantized,
    number_type,
)
from loftq_cli.report.tables import Code, Column, Facts, Records, Section, Table, View
from loftq_cli.schema import AdaptedLayer, Document, PlainLayer, QuantizeResults, UntouchedTensor

_Item = TypeVar("_Item")
_Key = TypeVar("_Key", bound=Hashable)

AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}

# So many kinds of untouched tensors are named on a page; the document names every tensor.
_NAMED_KINDS = 8
_GROUP_COLUMNS = (
    Column("kind", "layer", "name"),
    Column("count", "count", show=units.number),
    Column("shape", "out × in", show=units.shape),
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
        sections.append(_snippet(results))
    return View(title, sections, _records(results))


def auto_class(results: QuantizeResults) -> str:
    """The transformers class that loads the output."""
    return AUTO_CLASSES.get(results.task_type or "", results.architecture)


def _facts(results: QuantizeResults) -> list[tuple[str, str]]:
    totals = results.totals
    about = "about " if results.dry_run else ""
    kept = units.percent(totals.output_bytes / max(totals.input_bytes, 1))
    sizes = f"{units.size(totals.input_bytes)} → {about}{units.size(totals.output_bytes)}"
    facts = [("backbone", f"{sizes} ({kept} of it)")]
    bits = bits_a_weight(results)
    if bits is not None:
        facts.append(("precision", bits))
    trainable = units.plural(totals.trainable_parameters, "trainable parameter")
    facts.append(("adapter", f"{about}{units.size(totals.adapter_bytes)}, {trainable}"))
    for what, before, after in error_changes(results):
        where = " on the calibration text" if what == "output error" else ""
        facts.append((what, units.error_change(before, after) + where))
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
    groups = _by_shape(results.layers, lambda layer: layer.bits)
    # What is the same for all stands in the title of the page.
    varying = [
        key
        for key in ("bits", "rank")
        if len({getattr(layer, key) for layer in results.layers}) > 1
    ]
    columns = [*_GROUP_COLUMNS, *(Column(key, key) for key in varying)]
    errors = () if what is None else ERRORS[what]
    if what is not None:
        titles = zip((*errors, "removed"), ("quantized", "+ adapter", "removed"), strict=True)
        columns += [Column(key, title, show=units.percent) for key, title in titles]
    rows: list[list[object]] = []
    for (kind, shape, bits), layers in groups.items():
        settings = {"bits": bits, "rank": _range(layer.rank for layer in layers)}
        row: list[object] = [kind, len(layers), shape, *(settings[key] for key in varying)]
        if what is not None:
            before, after = (_mean(getattr(layer, key) for layer in layers) for key in errors)
            known = before is not None and after is not None
            row += [before, after, units.removed(before or 0.0, after or 0.0) if known else None]
        rows.append(row)
    title = "Layers that get an adapter" if what is None else f"Mean {what} by kind of layer"
    return Table(title, columns, rows)


def _range(ranks: Iterable[int | None]) -> int | str | None:
    found = {rank for rank in ranks if rank is not None}
    if len(found) < 2:
        return found.pop() if found else None
    return f"{min(found)} to {max(found)}"


def _without_adapter(results: QuantizeResults) -> Table:
    columns = [
        *_GROUP_COLUMNS,
        Column("share_of_bytes", "of bytes", show=units.percent),
        Column("reason", "because", "prose"),
    ]
    groups = _by_shape(results.without_adapter, lambda layer: layer.reason)
    rows = [
        [kind, len(group), shape, sum(layer.share_of_bytes for layer in group), reason]
        for (kind, shape, reason), group in groups.items()
    ]
    how = "Quantized" if is_quantized(results) else "Left as it was"
    return Table(f"{how} without an adapter", columns, rows)


def _untouched(tensors: Sequence[UntouchedTensor]) -> Table:
    columns = [
        Column("names", "tensor", "name"),
        Column("count", "count", show=units.number),
        Column("bytes", "size", show=units.size),
        Column("share_of_bytes", "of bytes", show=units.percent),
        Column("reason", "because", "prose"),
    ]
    rows: list[list[object]] = []
    for reason, group in _grouped(tensors, lambda tensor: tensor.reason).items():
        kinds = list(dict.fromkeys(_suffix(tensor.name, 2) for tensor in group))
        named = ", ".join(kinds[:_NAMED_KINDS])
        if len(kinds) > _NAMED_KINDS:
            named += f" and {units.plural(len(kinds) - _NAMED_KINDS, 'more kind')}"
        size = sum(tensor.bytes for tensor in group)
        share = sum(tensor.share_of_bytes for tensor in group)
        rows.append([named, len(group), size, share, reason])
    return Table("Left as it was", columns, rows)


def _snippet(results: QuantizeResults) -> Code:
    auto = auto_class(results)
    place = json.dumps(results.output, ensure_ascii=False)
    adapter = f'model, {place}, subfolder="loftq_init", is_trainable=True'
    return Code(
        "Load it",
        [
            "from peft import PeftModel",
            f"from transformers import {auto}",
            f"model = {auto}.from_pretrained({place})",
            f"model = PeftModel.from_pretrained({adapter})",
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


_Layer = TypeVar("_Layer", AdaptedLayer, PlainLayer)


def _by_shape(
    layers: Sequence[_Layer], more: Callable[[_Layer], _Key]
) -> dict[tuple[str, tuple[int, int], _Key], list[_Layer]]:
    """The layers by kind, shape and what ``more`` says of them.

    The kind is the end of a name, and more of it where shapes differ: GPT-2 calls two layers of a
    block `c_proj`, here they are `attn.c_proj` and `mlp.c_proj`.
    """
    same_end = _grouped(layers, lambda layer: _suffix(layer.name, 1))
    parts = {end: min(len({each.shape for each in same}), 2) for end, same in same_end.items()}

    def key(layer: _Layer) -> tuple[str, tuple[int, int], _Key]:
        kind = _suffix(layer.name, parts[_suffix(layer.name, 1)])
        return kind, layer.shape, more(layer)

    return _grouped(layers, key)


def _suffix(name: str, count: int) -> str:
    """The last parts of a dotted name; numbers only say which of many it is."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return ".".join(parts[-count:]) or name


def _grouped(items: Iterable[_Item], key: Callable[[_Item], _Key]) -> dict[_Key, list[_Item]]:
    groups: dict[_Key, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
