"""`loftq report`: what result documents say, together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loftq_cli.commands.run import Run, command, prepare_file
from loftq_cli.commands.spellings import option

if TYPE_CHECKING:
    from loftq_cli.commands.documents import Found
    from loftq_cli.schema import Document, Environment


@command(
    "report",
    files=Annotated[
        list[str],
        typer.Argument(
            metavar="FILES", help="Result documents or pages of them, directories, or - for stdin."
        ),
    ],
    output=option(
        Path | None,
        "--output",
        "-o",
        metavar="FILE",
        show_default="stdout",
        help="Write the report there; its ending says in which format, unless --format does.",
    ),
    html=None,
)
def report(run: Run, files: list[str], output: Path | None = None) -> None:
    """
    \b
    loftq report results/
    loftq check --json | loftq report - --format md
    loftq report before.json after.json --json | jq .results.findings
    loftq report results/ --format html -o page.html

    Puts result documents of any command together: the systems they come from, every result,
    findings drawn from the numbers, and what they recommend. A page for a browser has the documents
    in it, and can be given back.
    """
    if output is not None:
        prepare_file(output, "--output")
        run.output = output
    from loftq_cli import schema
    from loftq_cli.commands.documents import find_documents

    found = find_documents(files)
    documents = [document for _, document in found.documents]
    systems = {
        document.environment.model_dump_json(): document.environment for document in documents
    }
    try:
        _finish(run, found, documents, systems)
    except ArithmeticError as error:
        raise schema.NotAResultDocument(
            "the numbers in these documents contradict each other",
            cause=f"no command writes such: {error}",
            hint="leave out the documents that were edited by hand",
        ) from error


def _finish(
    run: Run,
    found: Found,
    documents: list[Document[Any]],
    systems: dict[str, Environment],
) -> None:
    from loftq_cli import schema
    from loftq_cli.report.advice import recommendations
    from loftq_cli.report.findings import findings

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
