"""The certificate: what was proved of a written directory, and what to do where that failed."""

from __future__ import annotations

from loftq_cli.report import units
from loftq_cli.report.checks import check_records, checks_table, trouble
from loftq_cli.report.parts import choice, model_name
from loftq_cli.report.tables import Column, Facts, Section, Table, View
from loftq_cli.schema import Document, VerifiedLayer, VerifyResults

# So many layers are shown; the document has them all.
_SHOWN = 10


def verify_view(document: Document[VerifyResults]) -> View:
    results = document.results
    sections: list[Section] = [Facts(_facts(document)), checks_table("Checks", results.tests)]
    notes = [(test.name, note) for test in results.tests for note in test.notes]
    if notes:
        sections.append(Facts(notes))
    wrong = [layer for layer in results.layers if not layer.agrees]
    if wrong:
        sections.append(_layers(wrong))
    sections += [trouble(test) for test in results.tests if test.status == "failed"]
    return View(_title(results), sections, check_records(results.tests))


def _title(results: VerifyResults) -> str:
    summary = results.summary
    if summary.failed:
        return f"NOT verified: {results.directory} fails {summary.failed} of {summary.total} checks"
    skipped = f", {summary.skipped} skipped" if summary.skipped else ""
    return f"Verified {results.directory}: {summary.passed} checks passed{skipped}"


def _facts(document: Document[VerifyResults]) -> list[tuple[str, str]]:
    results = document.results
    layers = "none quantized"
    if results.quantized_layers:
        layers = units.plural(results.quantized_layers, "quantized layer")
    if results.measured_layers:
        layers += f", {units.number(results.measured_layers)} measured against {results.source}"
    facts = [("made from", model_name(document)), ("layers", layers)]
    device = document.resolved.get("device")
    if device is not None:
        facts.append(choice(document, "device", str(device.value)))
    return [*facts, ("time", units.seconds(results.summary.seconds))]


def _layers(wrong: list[VerifiedLayer]) -> Table:
    columns = [
        Column("name", "layer", "name"),
        Column("weight_error_relative", "residual", show=_figure),
        Column("reported_weight_error_relative", "reported", show=_figure),
    ]
    more = f", the first {_SHOWN} of {len(wrong)}" if len(wrong) > _SHOWN else ""
    return Table(f"Residuals that differ{more}", columns, wrong[:_SHOWN])


def _figure(value: float) -> str:
    return f"{value:.6f}"
