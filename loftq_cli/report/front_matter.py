"""What a hub is to know of an output: the YAML in front of its README, as values.

Keys and values are those of the hub's documentation (docs/hub/model-cards in huggingface/hub-docs).
There a directory with a `config.json` is of the library `transformers`, also with an adapter in a
folder below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loftq_cli.report.formats import all_layers, is_quantized
from loftq_cli.report.loading import auto_class, is_causal
from loftq_cli.schema import Document, QuantizeResults

# The hub's names of tasks, by the class of transformers that does nothing else.
_TASKS = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForVideoClassification": "video-classification",
    "AutoModelForObjectDetection": "object-detection",
    "AutoModelForDepthEstimation": "depth-estimation",
}


def front_matter(
    document: Document[QuantizeResults], license_of_source: Mapping[str, Any]
) -> dict[str, Any]:
    """The values by their keys.

    Args:
        license_of_source: `license` and what belongs to it, as the source's own card has them.
    """
    results, model = document.results, document.model
    values: dict[str, Any] = {}
    if model is not None and model.source == "hub":
        values["base_model"] = model.id
        relation = "quantized" if is_quantized(results) else "adapter"
        values["base_model_relation"] = relation if results.merged is None else "finetune"
    values |= license_of_source
    values["library_name"] = "transformers"
    task = "text-generation" if is_causal(results) else _TASKS.get(auto_class(results))
    if task is not None:
        values["pipeline_tag"] = task
    adapter = ["lora", "peft"] if results.merged is None else []
    return values | {"tags": ["loftq", *adapter, *_formats(results)]}


def _formats(results: QuantizeResults) -> list[str]:
    if not is_quantized(results):
        return []
    bits = sorted({layer.bits for layer in all_layers(results) if layer.bits})
    return [results.settings.container, *(f"{each}-bit" for each in bits)]
