"""What `push` uploaded: where it is, and every file."""

from __future__ import annotations

from loftq_cli.report import units
from loftq_cli.report.parts import model_name
from loftq_cli.report.tables import Facts, Records, View
from loftq_cli.schema import Document, PushResults


def push_view(document: Document[PushResults]) -> View:
    results = document.results
    facts = [
        ("made from", model_name(document)),
        ("url", results.url),
        ("seen by", "its owners" if results.private else "everyone"),
        ("commit", results.commit),
        ("files", f"{units.number(len(results.files))}, {units.size(results.bytes)}"),
        ("time", units.seconds(results.seconds)),
    ]
    if results.deleted:
        facts.insert(-1, ("deleted there", ", ".join(results.deleted)))
    title = f"Pushed {results.directory} to {results.repository}"
    return View(title, [Facts(facts)], Records.of(results.files, ("name", "bytes", "sha256")))
