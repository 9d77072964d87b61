"""Documents as text, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from loftq_cli.errors import LoftqError
from loftq_cli.schema.comparing import CompareResults
from loftq_cli.schema.envelope import SCHEMA_VERSION, Document
from loftq_cli.schema.planning import SweepRanksResults, TargetsResults
from loftq_cli.schema.quantizing import (
    ExportResults,
    MergeResults,
    PushResults,
    QuantizeResults,
    VerifyResults,
)
from loftq_cli.schema.reporting import ReportResults
from loftq_cli.schema.running import CheckResults, GenerateResults, LoadResults

# In the order that a report has them: what one asks of a box first, then how much the model's
# commands found.
RESULTS: Mapping[str, type[BaseModel]] = {
    "check": CheckResults,
    "load": LoadResults,
    "targets": TargetsResults,
    "sweep-ranks": SweepRanksResults,
    "compare": CompareResults,
    "quantize": QuantizeResults,
    "verify": VerifyResults,
    "export": ExportResults,
    "merge": MergeResults,
    "push": PushResults,
    "generate": GenerateResults,
    "report": ReportResults,
}


class NotAResultDocument(LoftqError):
    """The text is no result document that this version can read."""


def dump_json(document: Document[Any]) -> str:
    """The document as text: keys in declared order, two spaces, a newline at the end."""
    data = document.model_dump(mode="json", by_alias=True)
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    # Readable in any script, and yet harmless to a terminal: only what does not print is escaped.
    lines = (line if line.isprintable() else _escaped(line) for line in text.split("\n"))
    return "\n".join(lines) + "\n"


def _escaped(line: str) -> str:
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)


def load_document(text: str) -> Document[Any]:
    """Reads what `dump_json` wrote, in this or an earlier minor version, or a later one."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        cause = "it is nested too deeply" if deep else str(error)
        raise NotAResultDocument("this is not JSON", cause=cause) from None
    return document_of(data)


def _require_countable(data: Any) -> None:
    """Refuses whole numbers of more than 64 bits: nothing counts so far, and no float holds all."""
    waiting = [data]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, int) and value.bit_length() > 64:
            raise NotAResultDocument(
                "this document is damaged", cause="a number in it has more than 64 bits"
            )


def document_of(data: Any) -> Document[Any]:
    """The same from JSON that has been parsed."""
    _require_countable(data)
    name = data.get("schema") if isinstance(data, dict) else None
    if not isinstance(name, str) or not name.startswith("loftq/"):
        raise NotAResultDocument(
            "this is not a loftq result document",
            cause='its "schema" is not "loftq/<command>"',
        )
    version = data.get("schema_version")
    if str(version).partition(".")[0] != SCHEMA_VERSION.partition(".")[0]:
        raise NotAResultDocument(
            f"cannot read version {version} of {name}",
            cause=f"this loftq reads version {SCHEMA_VERSION.partition('.')[0]}.x",
            hint="read it with the loftq that wrote it, or run the command again",
        )
    results = RESULTS.get(name.removeprefix("loftq/"))
    if results is None:
        raise NotAResultDocument(
            f"cannot read {name}",
            cause="this loftq has no such command",
            hint="pip install --upgrade loftq",
        )
    try:
        return Document[results].model_validate(data)  # type: ignore[valid-type]
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        raise NotAResultDocument(
            f"this {name} document is damaged", cause=f"{place}: {first['msg']}"
        ) from None
