"""Models that are known without their files: a table that is shipped with the package.

`known.json` is written by `examples/known_models.py`, which builds every model on torch's meta
device; a test builds them again. It holds what an `Outline` holds, by kind:

    {"transformers": VERSION, "reasons": [TEXT, ...], "models": {NAME: {
        "ids": [HUB ID, ...],          other names of the same shapes
        "architecture": CLASS, "context": TOKENS or null,
        "parameters": N, "vectors": [TENSORS, PARAMETERS],
        "layers": [[MODULE, INDICES, OUT, IN], ...],
        "left": [[TENSOR, INDICES, SHAPE, REASON], ...]}}}

A `*` in a name stands for each of the indices: "h.*.attn" with "0-2,5" is h.0, h.1, h.2 and h.5;
several stars have several lists, parted by ";", and every combination is meant. A NAME without
ids of its own is a model type of transformers, with the sizes that its config has by default.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from loftq_cli.formats import DTYPE_BITS
from loftq_cli.models.layers import (
    READ_DIRECTLY,
    LeftTensor,
    LinearLayer,
    is_read_directly,
    unadapted_by_names,
    with_stacks,
)
from loftq_cli.models.outline import Outline, make_outline

TABLE = Path(__file__).with_name("known.json")

# Counts and estimates do not depend on the dtype of files that nobody has opened.
_DTYPE = "BF16"
# All linear layers of these are Conv1D, and stored as (in, out).
_CONV1D = {"GPT2LMHeadModel", "OpenAIGPTLMHeadModel"}


def known_model(name: str) -> tuple[str, Outline] | None:
    """How the table describes ``name`` and the outline it has for it; None if it has none.

    Case does not matter, as on the hub.
    """
    table = _table()
    if name.casefold() not in _names():
        return None
    _, canonical = _names()[name.casefold()]
    entry = table["models"][canonical]
    if entry["ids"]:
        return f"the published sizes of {canonical}", _outline(canonical, entry, table["reasons"])
    what = f"transformers' default {canonical} config ({entry['architecture']})"
    return what, _outline(canonical, entry, table["reasons"])


def similar_names(name: str) -> list[str]:
    """Known names that a mistyped one may have meant, the nearest first."""
    spelled = {lower: each for lower, (each, _) in _names().items()}
    near = difflib.get_close_matches(name.casefold(), spelled, n=3, cutoff=0.8)
    if not near:
        last = name.casefold().rpartition("/")[2]
        near = difflib.get_close_matches(last, spelled, n=3, cutoff=0.75)
    return [spelled[each] for each in near]


def expand(pattern: str, indices: str) -> Iterator[str]:
    """("h.*.attn", "0-2") -> h.0.attn, h.1.attn, h.2.attn"""
    *parts, last = pattern.split("*")
    for numbers in product(*map(_numbers, indices.split(";") if parts else [])):
        yield "".join(f"{part}{number}" for part, number in zip(parts, numbers, strict=True)) + last


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text("utf-8"))
    return table


@cache
def _names() -> dict[str, tuple[str, str]]:
    """From every name in lower case to its own spelling and the name of its entry."""
    return {
        each.casefold(): (each, name)
        for name, entry in _table()["models"].items()
        for each in (name, *entry["ids"])
    }


def _outline(name: str, entry: dict[str, Any], reasons: list[str]) -> Outline:
    conv1d = entry["architecture"] in _CONV1D
    matrices: list[LinearLayer | LeftTensor] = [
        _left(f"{module}.weight", (out_features, in_features), READ_DIRECTLY)
        if is_read_directly(module, name)
        else LinearLayer(module, f"{module}.weight", out_features, in_features, conv1d, _DTYPE)
        for pattern, indices, out_features, in_features in entry["layers"]
        for module in expand(pattern, indices)
    ]
    matrices += (
        _left(tensor, tuple(shape), reasons[reason])
        for pattern, indices, shape, reason in entry["left"]
        for tensor in expand(pattern, indices)
    )
    matrices = list(with_stacks(matrices, (name,)))
    tensors, parameters = entry["vectors"]
    vectors = (tensors, parameters)
    architecture, context = entry["architecture"], entry["context"]
    outline = make_outline(architecture, matrices, vectors, entry["parameters"], context)
    return replace(outline, inventory=unadapted_by_names(outline.inventory, name))


def _left(tensor: str, shape: tuple[int, ...], reason: str) -> LeftTensor:
    return LeftTensor(tensor, shape, _DTYPE, DTYPE_BITS[_DTYPE] // 8 * prod(shape), reason)


def _numbers(text: str) -> list[int]:
    """ "0-2,5" -> [0, 1, 2, 5]"""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers
