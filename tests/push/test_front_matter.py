"""What a hub is told of an output, for each kind of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loftq_cli.report.front_matter import front_matter
from loftq_cli.schema import load_document
from tests.cli import documents


def told(changes: dict[str, Any], settings: dict[str, Any], **model: Any) -> dict[str, Any]:
    data = documents.quantize()
    data["results"] |= changes
    data["results"]["settings"] |= settings
    data["model"] |= model
    return front_matter(load_document(json.dumps(data)), {"license": "mit"})


def test_a_quantized_model_of_the_hubs() -> None:
    assert told({"auto_class": "AutoModelForCausalLM", "task_type": "CAUSAL_LM"}, {}) == {
        "base_model": "gpt2",
        "base_model_relation": "quantized",
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["loftq", "lora", "peft", "bitsandbytes", "4-bit"],
    }


def test_weights_as_they_were_with_an_adapter_are_not_quantized() -> None:
    found = told({}, {"quant_type": "none", "init": "lora"})
    assert found["base_model_relation"] == "adapter"
    assert found["tags"] == ["loftq", "lora", "peft"]


def test_a_merged_model_has_no_adapter() -> None:
    merged = {"source": "OUT", "adapter": "trained"}
    found = told(
        {"merged": merged, "without_adapter": documents.requantized_layers(), "layers": []}, {}
    )
    assert found["base_model_relation"] == "finetune"
    assert found["tags"] == ["loftq", "bitsandbytes", "4-bit"]


@pytest.mark.parametrize("source", ["directory", "demo"])
def test_what_is_on_no_hub_is_no_base_there(source: str) -> None:
    found = told({}, {}, id="./a-model", source=source)
    assert not found.keys() & {"base_model", "base_model_relation"}


def test_every_width_is_a_tag() -> None:
    layers = documents.quantize()["results"]["layers"]
    for number, layer in enumerate(layers):
        layer["bits"] = 8 if number % 2 else 3
    changes = {"layers": layers, "without_adapter": []}
    found = told(changes, {"container": "gptq", "quant_type": "int"})
    assert found["tags"][3:] == ["gptq", "3-bit", "8-bit"]


@pytest.mark.parametrize(
    ("auto_class", "task_type", "tag"),
    [
        ("AutoModelForSequenceClassification", "SEQ_CLS", "text-classification"),
        ("AutoModelForImageTextToText", None, "image-text-to-text"),
        # It may write music, and a hub would offer to chat with it.
        ("AutoModelForCausalLM", None, None),
        ("AutoModel", None, None),
    ],
)
def test_a_task_is_named_where_the_class_has_one(
    auto_class: str, task_type: str | None, tag: str | None
) -> None:
    found = told({"auto_class": auto_class, "task_type": task_type}, {})
    assert found.get("pipeline_tag") == tag
