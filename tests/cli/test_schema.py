"""The document's promises: stable names, versions, no NaN."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import documents
import pytest
from pydantic import ValidationError

from loftq_cli import schema
from loftq_cli.schema import NotAResultDocument, dump_json, load_document

# From the contract. Names may be added, never renamed or taken away within version 1.
CONTRACT = {
    "load": "parameters parameter_bytes load_seconds peak_memory_bytes device dtype",
    "generate": "generations average_seconds",
    "quantize": "layers totals",
}
ITEMS = {
    ("generate", "generations"): "prompt generated_text new_tokens seconds tokens_per_second",
    (
        "quantize",
        "layers",
    ): "name shape bits rank weight_error_relative quantized_only_error_relative iterations "
    "best_iteration seconds",
    ("quantize", "totals"): "weight_error_relative quantized_only_error_relative input_bytes "
    "output_bytes peak_memory_bytes seconds",
}


@pytest.mark.parametrize("command", CONTRACT)
def test_the_names_of_the_contract(command: str) -> None:
    data = json.loads(dump_json(load_document(json.dumps(documents.ALL[command]))))
    assert set(CONTRACT[command].split()) <= set(data["results"])
    for (owner, key), names in ITEMS.items():
        if owner == command:
            value = data["results"][key]
            assert set(names.split()) <= set(value[0] if isinstance(value, list) else value)


def test_units_are_in_the_names() -> None:
    assert load_document(json.dumps(documents.load())).results.load_seconds == 3.25
    text = dump_json(load_document(json.dumps(documents.quantize())))
    assert '"input_bytes": 548090880' in text, "bytes are whole numbers"


def changed(**changes: Any) -> str:
    return json.dumps({**documents.load(), **changes})


def test_a_later_minor_version_is_read_and_its_new_keys_are_passed_over() -> None:
    data = copy.deepcopy(documents.load())
    data["schema_version"] = "1.7"
    data["invented_later"] = {"a": 1}
    data["results"]["invented_later"] = 2
    document = load_document(json.dumps(data))
    assert document.results.parameters == 124_439_808
    assert "invented_later" not in dump_json(document)


def test_an_earlier_document_without_the_optional_keys_is_read() -> None:
    data = documents.load()
    for key in ("model", "resolved", "warnings", "timings_seconds"):
        del data[key]
    assert load_document(json.dumps(data)).warnings == []


@pytest.mark.parametrize(
    ("text", "what", "cause"),
    [
        ("", "this is not JSON", "Expecting value"),
        ("[1, 2]", "this is not a loftq result document", ""),
        ('{"schema": 3}', "this is not a loftq result document", ""),
        ('{"schema": "other/load"}', "this is not a loftq result document", ""),
        (changed(schema_version="2.0"), "cannot read version 2.0 of loftq/load", "version 1.x"),
        (changed(schema_version=None), "cannot read version None of loftq/load", ""),
        (changed(schema="loftq/dance"), "cannot read loftq/dance", "no such command"),
        (changed(results={}), "this loftq/load document is damaged", "results.architecture: "),
        (changed(argv="loftq"), "this loftq/load document is damaged", "argv: "),
    ],
)
def test_what_is_no_document_is_refused_by_name(text: str, what: str, cause: str) -> None:
    with pytest.raises(NotAResultDocument) as caught:
        load_document(text)
    assert caught.value.what == what
    assert cause in (caught.value.cause or "")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_nan_in_and_no_nan_out(value: float) -> None:
    data = documents.load()["results"]
    with pytest.raises(ValidationError):
        schema.LoadResults(**{**data, "load_seconds": value})
    with pytest.raises(NotAResultDocument, match="damaged"):
        load_document(changed(timings_seconds={"total": value}))
    with pytest.raises(NotAResultDocument, match="damaged"):
        load_document(changed(resolved={"x": {"value": value, "reason": "none"}}))


def test_text_of_any_script_stays_readable_and_controls_are_escaped() -> None:
    document = load_document(changed(warnings=["слой 层\x9b31m\u202e🙂"]))
    text = dump_json(document)
    assert r"слой 层\u009b31m\u202e🙂" in text
    assert load_document(text) == document
