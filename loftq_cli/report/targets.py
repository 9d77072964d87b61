"""The layers of a model by kind, the target presets with their cost, and what is skipped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from loftq_cli.report import units
from loftq_cli.report.experts import told
from loftq_cli.report.parts import TOLD_BY, model_name
from loftq_cli.report.sparks import bar
from loftq_cli.report.tables import Column, Facts, Records, Section, Table, View
from loftq_cli.schema import Document, LayerKind, TargetPreset, TargetsResults

# A preset that needs more names than this (numbered ones, block by block) is not written out on a
# page; the JSON document has every name.
_NAMES_SHOWN = 8


def targets_view(document: Document[TargetsResults]) -> View:
    results = document.results
    sections: list[Section] = [Facts(_facts(results))]
    if results.layers:
        sections.append(_layers(results.layers))
        sections.append(_presets(results.presets, results.rank))
    sections.append(_skipped(results))
    if results.layers:
        sections.append(Facts(_notes(results)))
    # Layers only, so that every value of the first column is a name for --target-modules.
    records = Records.of(results.layers, list(LayerKind.model_fields))
    return View(f"Targets in {model_name(document)}", sections, records)


def _facts(results: TargetsResults) -> list[tuple[str, str]]:
    linear = sum(kind.parameters for kind in results.layers)
    share = units.percent(linear / max(results.base_parameters, 1))
    count = sum(kind.count for kind in results.layers)
    facts = [
        ("parameters", f"{units.number(results.base_parameters)} ({results.architecture})"),
        ("linear layers", f"{units.number(count)} with {share} of the parameters"),
    ]
    if results.stored_bits is not None and results.quantized_bytes is not None:
        size, bits = units.size(results.quantized_bytes), units.plain(results.stored_bits)
        how = f"{results.container} at {results.bits} bits, {bits} stored bits a weight"
        facts.append(("quantized", f"{size} in {how}"))
    if results.experts is not None:
        facts.append(("experts", told(results.experts)))
    return [*facts, ("told by", TOLD_BY[results.counted_by])]


def _layers(kinds: Sequence[LayerKind]) -> Table:
    columns = [
        Column("name", "layer", "name"),
        Column("count", "count", show=units.number),
        Column(lambda kind: (kind.out_features, kind.in_features), "out × in", show=units.shape),
        Column("parameters", "parameters", show=units.number),
        Column("share_of_parameters", "of all", show=units.percent),
        Column("share_of_parameters", "", "picture", bar),
        Column("role", "role", "prose"),
    ]
    return Table("Linear layers", columns, kinds)


def _presets(presets: Sequence[TargetPreset], rank: int) -> Table:
    columns = [
        Column("name", "preset", "prose"),
        Column("modules", "modules", show=units.number),
        Column("trainable_parameters", "trainable", show=units.number),
        Column("trainable_percent", "of all", show=lambda value: units.percent(value / 100)),
        Column("target_modules", "--target-modules", "name", _names),
    ]
    return Table(f"Presets at rank {rank}", columns, presets)


def _names(names: Sequence[str]) -> str:
    if len(names) <= _NAMES_SHOWN:
        return ",".join(names)
    return f"{','.join(names[:3])},… ({len(names)} names, see --json)"


def _skipped(results: TargetsResults) -> Table:
    columns = [
        Column("name", "skipped", "name"),
        Column("count", "count", show=units.number),
        Column("parameters", "parameters", show=units.number),
        Column("share_of_parameters", "of all", show=units.percent),
        Column("reason", "because", "prose"),
    ]
    left = "Left as they are"
    if results.experts is not None and results.experts.quantized:
        left = "Without an adapter, and but for experts left as they are"
    return Table(left, columns, results.skipped)


def _notes(results: TargetsResults) -> list[tuple[str, str]]:
    notes = []
    for kind in results.layers:
        others = [name for name in kind.also_selects if name != kind.name]
        if others:
            notes.append(("mind", f"{kind.name} also selects {', '.join(others)}"))
    shapes = Counter(kind.name for kind in results.layers)
    several = [name for name, count in shapes.items() if count > 1]
    if several:
        notes.append(("mind", f"{', '.join(several)}: each selects every shape it is listed with"))
    if results.guessed:
        notes.append(("guessed", f"the role of {', '.join(results.guessed)}, from its place"))
    if results.without_role:
        names = ", ".join(results.without_role)
        notes.append(("no role", f"{names}: only all-linear takes these"))
    notes.append(("use", "--target-modules takes names of the first column, joined by commas"))
    return notes
