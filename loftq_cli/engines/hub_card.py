"""What a directory says of itself on a hub: README, adapter config and report, made anew.

Nothing on the disk changes. The report lists the README and the adapter config that are uploaded
with it, so a download is proved by its own report, as the directory is by its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path, PurePath
from typing import Any

from loftq_cli import schema
from loftq_cli.checkpoint.files import read_file
from loftq_cli.checkpoint.index import MAX_CONFIG_BYTES, load_json
from loftq_cli.engines.report_file import Report
from loftq_cli.engines.written import ADAPTER_CONFIG_NAME
from loftq_cli.errors import LoftqError, first_line
from loftq_cli.models.source import CONFIG_FILE, README_FILE, REPORT_FILE
from loftq_cli.models.spec import DEMO_DIRECTORY
from loftq_cli.record import Record
from loftq_cli.report.card import card
from loftq_cli.report.front_matter import front_matter

_LICENSE_KEYS = ("license", "license_name", "license_link")


def texts_for_hub(
    directory: Path, report: Report, repository: str, record: Record
) -> tuple[Report, dict[str, bytes]]:
    """The report as it is uploaded, and the contents of the files that differ from the disk's.

    Where the licence of the original is not known, that is a warning.

    Args:
        directory: whose files have been held against ``report``.
    """
    results = report.results.model_copy(update={"repository": repository})
    report = report.model_copy(update={"results": results})
    _tell_places(report, record)
    yaml = _yaml(front_matter(report, _license(directory, report, record)))
    changed = {README_FILE: f"---\n{yaml}\n---\n\n{card(report)}".encode()}
    if results.layers:
        adapter = load_json(directory / ADAPTER_CONFIG_NAME)
        text = json.dumps(
            {**adapter, "base_model_name_or_path": repository}, indent=2, ensure_ascii=False
        )
        changed[ADAPTER_CONFIG_NAME] = f"{text}\n".encode()
    listed = [_listed(name, content) for name, content in changed.items()]
    kept = [each for each in results.files if each.name not in changed]
    files = sorted([*kept, *listed], key=lambda file: file.name)
    report = report.model_copy(update={"results": results.model_copy(update={"files": files})})
    return report, changed | {REPORT_FILE: schema.dump_json(report).encode()}


def _tell_places(report: Report, record: Record) -> None:
    """What is published of this machine: the report has the command line, and names in full."""
    results = report.results
    names = [*report.argv, results.output, "" if report.model is None else report.model.id]
    if results.merged is not None:
        names += [results.merged.source, results.merged.adapter]
    if places := sorted({name for name in names if PurePath(name).is_absolute()}):
        record.note(f"{REPORT_FILE} there names places of this machine: {', '.join(places)}")


def _listed(name: str, content: bytes) -> schema.WrittenFile:
    return schema.WrittenFile(name=name, bytes=len(content), sha256=sha256(content).hexdigest())


def _yaml(values: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    return str(ModelCardData(**values).to_yaml())


def _license(directory: Path, report: Report, record: Record) -> dict[str, Any]:
    """`license` and what belongs to it, by the original's card or by the config."""
    try:
        found = _license_in(_source_card(report))
        why = "its card names none"
    except Exception as error:  # the network's, YAML's, the disk's: no licence is known either way
        found, why = {}, error.what if isinstance(error, LoftqError) else first_line(error)
    found = found or _license_in(load_json(directory / CONFIG_FILE))
    if not found:
        model = "the original" if report.model is None else report.model.id
        record.warn(
            f"the card on the hub names no licence, that of {model} is not known: {why}; what you "
            "publish is under it all the same"
        )
    return found


def _source_card(report: Report) -> dict[str, Any]:
    """The metadata of the original's card."""
    from huggingface_hub import ModelCard, hf_hub_download

    model = report.model
    if model is None:
        raise LoftqError("the report names no model")
    if model.source == "hub":
        path = Path(hf_hub_download(model.id, README_FILE, revision=model.revision))
    elif model.source == "demo":
        path = DEMO_DIRECTORY / "MODEL_CARD.md"
    else:
        path = Path(model.id).expanduser() / README_FILE
    text = read_file(path, MAX_CONFIG_BYTES).decode("utf-8-sig")
    data: dict[str, Any] = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    return data


def _license_in(data: Mapping[str, Any]) -> dict[str, Any]:
    """As text, or a list of it, which is what hubs take."""

    def is_text(value: object) -> bool:
        each = value if isinstance(value, list) else [value]
        return bool(each) and all(isinstance(text, str) and text.strip() for text in each)

    named = {key: data[key] for key in _LICENSE_KEYS if is_text(data.get(key))}
    return named if "license" in named else {}
