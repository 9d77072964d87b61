"""`loftq report`: what result documents say, together."""

from __future__ import annotations

from typing import Annotated

import typer

from loftq_cli.commands.run import Run, command


@command(
    "report",
    files=Annotated[
        list[str],
        typer.Argument(
            metavar="FILES", help="Result documents, directories of them, or - for stdin."
        ),
    ],
)
def report(run: Run, files: list[str]) -> None:
    """
    \b
    loftq report results/
    loftq check --json | loftq report - --format md
    loftq report before.json after.json --json | jq .results.findings

    Puts result documents of any command together: the systems they come from, every result,
    findings drawn from the numbers, and what they recommend.
    """
    from loftq_cli import schema
    from loftq_cli.commands.documents import find_documents
    from loftq_cli.report.advice import recommendations
    from loftq_cli.report.findings import findings

    found = find_documents(files)
    documents = [document for _, document in found.documents]
    systems = {
        document.environment.model_dump_json(): document.environment for document in documents
    }
    run.finish(
        schema.ReportResults(
            systems=list(systems.values()),
            documents=[
                schema.ReportedDocument(
                    file=file, document=document.model_dump(mode="json", by_alias=True)
                )
                for file, document in found.documents
            ],
            findings=findings(documents),
            recommendations=recommendations(documents),
            skipped=[
                schema.SkippedFile(file=file, reason=reason) for file, reason in found.skipped
            ],
        )
    )
