"""Which function shows which document. A new command adds its function to `VIEWS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from loftq_cli.report import units
from loftq_cli.report.quantize import quantize_view
from loftq_cli.report.tables import Column, Facts, Passage, Section, Table, View
from loftq_cli.schema import Document, GenerateResults, LoadResults


def view_of(document: Document[Any]) -> View:
    """What there is to see in the document."""
    return replace(VIEWS[document.command](document), warnings=document.warnings)


def load_view(document: Document[LoadResults]) -> View:
    results = document.results
    by_dtype = ", ".join(
        f"{units.size(count)} {dtype}" for dtype, count in results.bytes_by_dtype.items()
    )
    facts = [
        ("architecture", results.architecture),
        ("parameters", f"{units.number(results.parameters)} in {by_dtype}"),
    ]
    if results.quantization is not None:
        layers = units.plural(results.quantized_layers, "quantized layer")
        facts.append(("quantization", f"{results.quantization}, {layers}"))
    if results.adapter is not None:
        count = units.number(results.adapter_parameters)
        facts.append(("adapter", f"{results.adapter}, {count} parameters"))
    if results.tokenizer is not None:
        size = results.vocabulary_size
        tokens = f", {units.number(size)} tokens" if size is not None else ""
        facts.append(("tokenizer", f"{results.tokenizer}{tokens}"))
    facts += [
        _choice(document, "device", results.device),
        _choice(document, "dtype", results.dtype),
        ("time", _seconds_split(document, results.load_seconds)),
        ("peak memory", units.size(results.peak_memory_bytes)),
    ]
    return View(f"Loaded {model_name(document)}", [Facts(facts)], _one_record(results))


def generate_view(document: Document[GenerateResults]) -> View:
    results = document.results
    sections: list[Section] = [
        Passage(
            f"› {each.prompt}",
            each.generated_text,
            f"{units.plural(each.new_tokens, 'token')} in {units.seconds(each.seconds)}, "
            f"{units.significant(each.tokens_per_second)} tokens/s",
        )
        for each in results.generations
    ]
    facts = [
        _choice(document, "device", results.device),
        _choice(document, "dtype", results.dtype),
    ]
    if results.adapter is not None:
        facts.insert(0, ("adapter", results.adapter))
    if len(results.generations) > 1:
        rate = units.significant(results.average_tokens_per_second)
        facts.append(("average", f"{units.seconds(results.average_seconds)}, {rate} tokens/s"))
    columns = [Column(key, key) for key in type(results.generations[0]).model_fields]
    records = Table(
        "generations",
        columns,
        [[getattr(each, column.key) for column in columns] for each in results.generations],
    )
    return View(f"Generated with {model_name(document)}", [*sections, Facts(facts)], records)


def model_name(document: Document[Any]) -> str:
    model = document.model
    if model is None:
        return "the model"
    return model.id if model.revision is None else f"{model.id} ({model.revision})"


def _choice(document: Document[Any], name: str, value: str) -> tuple[str, str]:
    """A value with the reason for it, where it was chosen."""
    resolved = document.resolved.get(name)
    return (name, value if resolved is None else f"{value} ({resolved.reason})")


def _seconds_split(document: Document[Any], total: float) -> str:
    parts = [
        f"{name} {units.seconds(spent)}"
        for name, spent in document.timings_seconds.items()
        if name != "total"
    ]
    return units.seconds(total) + (f" ({', '.join(parts)})" if parts else "")


def _one_record(results: LoadResults) -> Table:
    data = results.model_dump()
    data["bytes_by_dtype"] = [f"{key}={value}" for key, value in results.bytes_by_dtype.items()]
    return Table("load", [Column(key, key) for key in data], [list(data.values())])


VIEWS: Mapping[str, Callable[[Document[Any]], View]] = {
    "quantize": quantize_view,
    "load": load_view,
    "generate": generate_view,
}
