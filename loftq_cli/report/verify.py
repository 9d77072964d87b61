"""The certificate: what was proved of a written directory, and what to do where that failed."""

from __future__ import annotations

from loftq_cli.report import units
from loftq_cli.report.parts import choice, model_name
from loftq_cli.report.tables import Column, Facts, Section, Table, View
from loftq_cli.schema import Document, VerifiedLayer, VerifyResults

_STYLES = {"passed": "green", "failed": "bold red", "skipped": "yellow"}
# So many layers are shown; the document has them all.
_SHOWN = 10


def verify_view(document: Document[VerifyResults]) -> View:
    results = document.results
    sections: list[Section] = [Facts(_facts(document)), _tests(results)]
    wrong = [layer for layer in results.layers if not layer.agrees]
    if wrong:
        sections.append(_layers(wrong))
    for test in results.tests:
        if test.status == "failed":
            items = [("failed", test.name), ("to verify", test.verified)]
            items += [("cause", test.cause)] if test.cause else []
            items += [("hint", test.hint)] if test.hint else []
            sections.append(Facts(items))
    return View(_title(results), sections, _records(results))


def _title(results: VerifyResults) -> str:
    summary = results.summary
    skipped = f", {summary.skipped} skipped" if summary.skipped else ""
    if summary.failed:
        return f"NOT verified: {results.directory} fails {summary.failed} of {summary.total} checks"
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


def _tests(results: VerifyResults) -> Table:
    columns = [
        Column("name", "check", "prose"),
        Column("status", "result", style=lambda value: _STYLES.get(value, "")),
        Column("seconds", "time", show=units.seconds),
        Column("detail", "what was found", "prose"),
    ]
    rows = [[test.name, test.status, test.seconds, test.detail] for test in results.tests]
    return Table("Checks", columns, rows)


def _layers(wrong: list[VerifiedLayer]) -> Table:
    columns = [
        Column("name", "layer", "name"),
        Column("weight_error_relative", "residual", show=_figure),
        Column("reported_weight_error_relative", "reported", show=_figure),
    ]
    rows = [
        [layer.name, layer.weight_error_relative, layer.reported_weight_error_relative]
        for layer in wrong[:_SHOWN]
    ]
    more = f", the first {_SHOWN} of {len(wrong)}" if len(wrong) > _SHOWN else ""
    return Table(f"Residuals that differ{more}", columns, rows)


def _figure(value: float) -> str:
    return f"{value:.6f}"


def _records(results: VerifyResults) -> Table:
    """One line a check; its figures are in one column, as key=value."""
    keys = ["name", "status", "seconds", "verified", "detail", "cause", "hint"]
    rows = [
        [
            *(getattr(test, key) for key in keys),
            [f"{key}={value}" for key, value in test.figures.items()],
        ]
        for test in results.tests
    ]
    return Table("tests", [Column(key, key) for key in [*keys, "figures"]], rows)
