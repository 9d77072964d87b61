"""What `export` wrote: the sizes in both containers, and every file."""

from __future__ import annotations

from loftq_cli.report import units
from loftq_cli.report.parts import model_name
from loftq_cli.report.tables import Facts, Records, View
from loftq_cli.schema import Document, ExportResults


def export_view(document: Document[ExportResults]) -> View:
    results = document.results
    bits = f"{units.plain(results.source_stored_bits)} → {units.plain(results.stored_bits)}"
    facts = [
        ("made from", model_name(document)),
        ("layers", f"{units.plural(results.quantized_layers, 'quantized layer')}, none rounded"),
        ("backbone", f"{units.size(results.input_bytes)} → {units.size(results.output_bytes)}"),
        ("precision", f"{bits} bits a weight, scales included"),
        ("files", units.number(len(results.files))),
        ("time", units.seconds(results.seconds)),
    ]
    title = (
        f"Wrote {results.output}: {results.source} in {results.container} "
        f"instead of {results.source_container}"
    )
    return View(title, [Facts(facts)], Records.of(results.files, ("name", "bytes", "sha256")))
