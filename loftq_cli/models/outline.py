"""What a model is made of, without its weights: linear layers, the rest, and how many parameters.

An outline comes from safetensors headers and config.json, or from the shipped table (`known.py`).
Nothing here needs torch, and nothing reads a weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from loftq_cli.checkpoint.safetensors import TensorInfo
from loftq_cli.models import layers
from loftq_cli.models.layers import Inventory, LeftTensor, LinearLayer, last_part
from loftq_cli.models.source import class_name

TIED_TO_HEAD = f"{layers.EMBEDDING}, tied to the output head"

# Tensors that checkpoints carry although no optimizer ever sees them: rotary frequencies,
# positions, running statistics. (So are causal masks such as GPT-2's `attn.bias`, 1 × 1 × n × n.)
_BUFFERS = {
    "masked_bias", "inv_freq", "cos_cached", "sin_cached", "position_ids", "token_type_ids",
    "running_mean", "running_var", "num_batches_tracked", "final_logits_bias",
}  # fmt: skip
_SCORES_TOKENS = re.compile(
    r"(ForCausalLM|LMHeadModel|LMHead|ForConditionalGeneration|ForMaskedLM|ForPreTraining)$"
)


@dataclass(frozen=True)
class Outline:
    """A model's matrices one by one, its vectors as one sum, and every parameter counted once.

    ``vectors`` is (tensors, parameters) of what has one dimension: norms and biases.
    ``vocabulary`` is how many tokens the output head scores, 0 for a model that scores none;
    ``context`` is how many tokens it can read at once, None where its config does not say.
    """

    architecture: str
    inventory: Inventory
    vectors: tuple[int, int]
    parameters: int
    vocabulary: int
    context: int | None

    @property
    def layers(self) -> list[LinearLayer]:
        return self.inventory.layers


def outline_of(tensors: Iterable[TensorInfo], config: dict[str, Any]) -> Outline:
    """The outline of a checkpoint with these tensors and this config.json."""
    parameters = [info for info in tensors if not _is_buffer(info)]
    sizes = {info.name: info.elements for info in parameters}
    inventory = layers.linear_layers(parameters, config)
    copies = _tied_copies(inventory.left, config)
    entries = [entry for entry in inventory.entries if entry not in copies]
    vectors = {each for each in entries if isinstance(each, LeftTensor) and len(each.shape) < 2}
    outline = make_outline(
        class_name(config),
        [entry for entry in entries if entry not in vectors],
        (len(vectors), sum(sizes[vector.tensor] for vector in vectors)),
        sum(sizes[entry.tensor] for entry in entries),
        _context(config),
    )
    return replace(outline, inventory=replace(outline.inventory, unadapted=inventory.unadapted))


def make_outline(
    architecture: str,
    matrices: Iterable[LinearLayer | LeftTensor],
    vectors: tuple[int, int],
    parameters: int,
    context: int | None,
) -> Outline:
    """Adds what follows from the rest: the vocabulary, and which embedding is the head as well."""
    entries = list(matrices)
    vocabulary = 0
    if _SCORES_TOKENS.search(architecture):
        heads = _left_as(entries, layers.OUTPUT_HEAD)
        embeddings = _left_as(entries, layers.EMBEDDING)
        vocabulary = max((head.shape[0] for head in heads), default=0)
        largest = max(embeddings, key=lambda each: each.shape[0], default=None)
        if largest is not None and vocabulary < largest.shape[0]:
            vocabulary = largest.shape[0]
            entries[entries.index(largest)] = replace(largest, reason=TIED_TO_HEAD)
    inventory = Inventory(tuple(entries))
    return Outline(architecture, inventory, vectors, parameters, vocabulary, context)


def _left_as(entries: Iterable[LinearLayer | LeftTensor], reason: str) -> list[LeftTensor]:
    return [each for each in entries if isinstance(each, LeftTensor) and each.reason == reason]


def _is_buffer(info: TensorInfo) -> bool:
    last = last_part(info.name)
    floating = info.dtype.startswith(("F", "BF"))
    return not floating or last in _BUFFERS or (last == "bias" and len(info.shape) > 2)


def _tied_copies(left: list[LeftTensor], config: dict[str, Any]) -> set[LeftTensor]:
    """What repeats the token embedding: some files hold a tied matrix more than once."""
    embeddings = _left_as(left, layers.EMBEDDING)
    if not embeddings or not _ties_embeddings(config):
        return set()
    token = max(embeddings, key=lambda each: each.shape[0])
    same = [each for each in left if each.shape == token.shape]
    copies = {each for each in same if each.reason == layers.OUTPUT_HEAD}
    if any(last_part(each.tensor.removesuffix(".weight")) == "shared" for each in same):
        copies |= {each for each in same if each.tensor.endswith("embed_tokens.weight")}
    return copies


def _ties_embeddings(config: dict[str, Any]) -> bool:
    """`tie_word_embeddings`; true where it is not written, since configs used to say only false."""
    nested = _text_config(config).get("tie_word_embeddings")
    return config.get("tie_word_embeddings", nested) is not False


def _context(config: dict[str, Any]) -> int | None:
    for place in (config, _text_config(config)):
        for key in ("max_position_embeddings", "n_positions"):
            value = place.get(key)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a multimodal model's config that is about text."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else {}
