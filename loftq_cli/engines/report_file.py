"""The report in an output directory: written with it, found again, believed only as a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loftq_cli import schema
from loftq_cli.checkpoint.index import parse_json
from loftq_cli.checkpoint.safetensors import read_file
from loftq_cli.checkpoint.staging import Staging
from loftq_cli.engines.fingerprint import digest
from loftq_cli.engines.output import write_text
from loftq_cli.errors import LoftqError, ModelNotFound, OutputExists
from loftq_cli.models.source import REPORT_FILE
from loftq_cli.report.card import card

Report = schema.Document[schema.QuantizeResults]

# A model of a thousand layers has a report of about a megabyte.
_MAX_REPORT_BYTES = 200_000_000
NOT_OURS = "give the directory that `loftq quantize --output` wrote"


def write_report(staging: Staging, document: Report) -> None:
    """The report and the README of the output directory."""
    write_text(staging, REPORT_FILE, schema.dump_json(document))
    write_text(staging, "README.md", card(document))


def read_report(directory: Path) -> Report:
    """The report in ``directory``.

    Raises:
        ModelNotFound: there is none, so this is nothing that loftq wrote.
        LoftqError: there is one, and it cannot be read as such.
    """
    path = directory / REPORT_FILE
    if not path.is_file():
        why = f"it has no {REPORT_FILE}" if directory.is_dir() else "there is no such directory"
        raise ModelNotFound(f"{directory} is no output of loftq", cause=why, hint=NOT_OURS)
    raw = read_file(path, _MAX_REPORT_BYTES)
    parse_json(raw, path)
    try:
        document = schema.load_document(raw.decode())
    except LoftqError as error:
        raise error.within(str(path)) from None
    if not isinstance(document.results, schema.QuantizeResults) or document.results.dry_run:
        raise ModelNotFound(
            f"{directory} is no output of loftq",
            cause=f"its {REPORT_FILE} is no report of a finished quantize run",
            hint=NOT_OURS,
        )
    return document


def finished_run(output: Path, fingerprint: Mapping[str, Any]) -> Report | None:
    """The report of a complete output that these very settings made; None if there is no such."""
    try:
        document = read_report(output)
    except LoftqError:
        return None
    return document if document.results.fingerprint == digest(fingerprint) else None


def refuse_to_replace_foreign(output: Path) -> None:
    """--force replaces what loftq wrote, or an empty directory, and nothing else.

    Raises:
        OutputExists: there is something else in the directory.
    """
    if output.is_dir() and any(output.iterdir()) and not (output / REPORT_FILE).is_file():
        raise OutputExists(
            f"{output} was not written by loftq, and --force would delete it",
            cause=f"it has no {REPORT_FILE}",
            hint="choose another --output, or empty the directory yourself",
        )
