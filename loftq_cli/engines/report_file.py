"""The report in an output directory: written with it, found again, believed only as a report."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from loftq_cli import schema
from loftq_cli.checkpoint.files import read_file
from loftq_cli.checkpoint.index import parse_json
from loftq_cli.checkpoint.staging import Staging, refuse_existing, refuse_unusable
from loftq_cli.engines.fingerprint import digest
from loftq_cli.engines.output import write_text
from loftq_cli.errors import LoftqError, ModelNotFound, OutputExists, UsageError
from loftq_cli.models.source import MAX_REPORT_BYTES, MERGE_FILE, README_FILE, REPORT_FILE
from loftq_cli.models.spec import hub_id
from loftq_cli.report.card import card

Report = schema.Document[schema.QuantizeResults]

NOT_OURS = "give the directory that `loftq quantize --output` wrote"


def write_report(staging: Staging, document: Report) -> Report:
    """The README of the output directory and the report, which lists it; gives what that says."""
    write_text(staging, README_FILE, card(document))
    readme = staging.finished[README_FILE]
    listed = schema.WrittenFile(name=README_FILE, bytes=readme.bytes, sha256=readme.sha256)
    files = sorted([*document.results.files, listed], key=lambda file: file.name)
    results = document.results.model_copy(update={"files": files})
    document = document.model_copy(update={"results": results})
    write_text(staging, REPORT_FILE, schema.dump_json(document))
    return document


def read_report(directory: Path) -> Report:
    """The report in ``directory``.

    Raises:
        ModelNotFound: there is none, so this is nothing that loftq wrote.
        LoftqError: there is one, and it cannot be read as such.
    """
    path = directory / REPORT_FILE
    if not path.is_file():
        raise _no_report(directory)
    raw = read_file(path, MAX_REPORT_BYTES)
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


def _no_report(directory: Path) -> ModelNotFound:
    what, why = f"{directory} is no output of loftq", f"it has no {REPORT_FILE}"
    if not directory.is_dir():
        hint = NOT_OURS
        with suppress(UsageError):
            repository, revision = hub_id(str(directory))
            at = "" if revision is None else f" --revision {revision}"
            hint = f"what lies on a hub is downloaded first: hf download {repository}{at} "
            hint += f"--local-dir DIR && loftq verify DIR; otherwise {NOT_OURS}"
        return ModelNotFound(what, cause="there is no such directory", hint=hint)
    if not any(directory.glob("*.safetensors")):
        return ModelNotFound(what, cause=why, hint=NOT_OURS)
    if (directory / MERGE_FILE).is_file():
        return ModelNotFound(
            f"{directory} is no quantized directory",
            cause=f"it is a merged model, by its {MERGE_FILE}: `merge` held it against the adapted "
            "one when it wrote it",
            hint=f"loftq load -m {shlex.quote(str(directory))}",
        )
    return ModelNotFound(
        what,
        cause=f"{why}, and there are weights in it",
        hint="if it came from a hub, fetch all of its files: hf download ORG/NAME --local-dir DIR; "
        f"if it is an original, quantize it first: loftq quantize -m {shlex.quote(str(directory))} "
        "-o OUT",
    )


def finished_run(output: Path, fingerprint: Mapping[str, Any]) -> Report | None:
    """The report of a complete output that these very settings made; None if there is no such."""
    try:
        document = read_report(output)
    except LoftqError:
        return None
    return document if document.results.fingerprint == digest(fingerprint) else None


def is_plain(name: str) -> bool:
    """Whether a name in a report's list is that of a file below the directory.

    One with `..` or a root in it would lead outside.
    """
    path = PurePosixPath(name)
    outside = path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name
    return name == str(path) and name != "." and not outside


def refuse_output(output: Path, *, force: bool, resume: bool) -> None:
    """An output that cannot be written or may not be replaced, before anything else is looked at.

    `Staging` looks again when it holds the lock.

    Raises:
        LoftqError: as `staging.refuse_unusable`, `refuse_existing` and `refuse_to_replace_foreign`.
    """
    refuse_unusable(output)
    if force:
        refuse_to_replace_foreign(output)
    elif not resume:
        refuse_existing(output, force)


def refuse_to_replace_foreign(output: Path) -> None:
    """--force replaces what loftq wrote, or an empty directory, and nothing else.

    Raises:
        OutputExists: there is something else in the directory.
    """
    ours = any((output / name).is_file() for name in (REPORT_FILE, MERGE_FILE))
    if output.is_dir() and any(output.iterdir()) and not ours:
        raise OutputExists(
            f"{output} was not written by loftq, and --force would delete it",
            cause=f"it has no {REPORT_FILE}",
            hint="choose another --output, or empty the directory yourself",
        )
