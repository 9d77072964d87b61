"""The source of a `quantize` run: its config, and what it may not be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.index import load_json
from loftq_cli.errors import AlreadyQuantized, CorruptCheckpoint, LoftqError, ModelNotFound
from loftq_cli.formats import SHORT_NAMES

CONFIG_FILE = "config.json"
REPORT_FILE = "loftq_report.json"
README_FILE = "README.md"
# A model of a thousand layers has a report of about a megabyte.
MAX_REPORT_BYTES = 200_000_000
MERGE_FILE = "loftq_merge.json"  # of a merged model: what it was made from

# Weights in these formats execute code when they are opened.
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_config(directory: Path) -> dict[str, Any]:
    """The directory's config.json.

    Raises:
        ModelNotFound: there is none.
        CorruptCheckpoint: it is no JSON object, or its `architectures` are no list of names.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise ModelNotFound(
            f"{directory} has no {CONFIG_FILE}",
            cause="nothing says which architecture the weights belong to",
            hint="give the directory that has config.json and the weights in it",
        )
    config = load_json(path)
    check_values(config, path)
    return config


def main_dtype(config: dict[str, Any]) -> str:
    """The dtype of the model by its config, as safetensors spells it.

    float32 without one: a loader takes that of the first tensor then, and loftq names one.
    """
    return SHORT_NAMES.get(str(config.get("dtype", config.get("torch_dtype"))), "F32")


# The sizes a model class is built from, by their names in config.json, and the largest in sight of
# any model. Beyond them a class would take hours to build, or all memory.
_SIZES = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"), 10_000),
    **dict.fromkeys(
        (
            "hidden_size",
            "n_embd",
            "d_model",
            "intermediate_size",
            "num_attention_heads",
            "n_head",
            "num_key_value_heads",
            "vocab_size",
            "n_positions",
            "max_position_embeddings",
        ),
        1_000_000_000,
    ),
    "num_labels": 1_000_000,  # each of them is given a name
}


# As transformers takes them; of what it does not know, it makes its own default.
_FLOATING = re.compile(r"auto|(torch\.)?(b?float\d+(_\w+)?|float|half|double)")


def check_values(config: dict[str, Any], path: Path) -> None:
    """Raises CorruptCheckpoint naming the first key whose value cannot be meant.

    `architectures` must be a list of names, `model_type` a name, a dtype one of floating-point
    numbers, and sizes whole numbers in range.
    """
    named = config.get("architectures")
    if named is not None and not (
        isinstance(named, list) and all(isinstance(name, str) for name in named)
    ):
        raise CorruptCheckpoint(
            f"{path}: architectures is not a list of names", cause=f"it is {named!r:.80}"
        )
    kind = config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise CorruptCheckpoint(f"{path}: model_type is not a name", cause=f"it is {kind!r:.80}")
    for key in ("dtype", "torch_dtype"):
        dtype = config.get(key)
        if dtype is not None and not (isinstance(dtype, str) and _FLOATING.fullmatch(dtype)):
            raise CorruptCheckpoint(
                f"{path}: {key} is no type of floating-point numbers", cause=f"it is {dtype!r:.80}"
            )
    for key, largest in _SIZES.items():
        value = config.get(key)
        # Models whose layers differ list one size for each.
        values = value if isinstance(value, list) and value else [value]
        if value is not None and not all(
            type(each) is int and 1 <= each <= largest for each in values
        ):
            raise CorruptCheckpoint(
                f"{path}: {key} is out of range",
                cause=f"it is {value!r:.80}, and a whole number from 1 to {largest} is expected",
            )


def class_name(config: dict[str, Any]) -> str:
    """The model class that the checkpoint was saved from."""
    named = config.get("architectures") or [config.get("model_type") or "unknown"]
    return str(named[0])


def quantization_method(config: dict[str, Any]) -> Any:
    """What `quantization_config` calls its method; None without one."""
    quantization = config.get("quantization_config")
    return quantization.get("quant_method") if isinstance(quantization, dict) else None


def refuse_quantized(directory: Path, config: dict[str, Any]) -> None:
    """Raises AlreadyQuantized, naming the original where some file of the checkpoint does."""
    if config.get("quantization_config") is None:
        return
    method = quantization_method(config)
    original = _original(directory, config)
    raise AlreadyQuantized(
        f"{directory} is already quantized ({method or 'by an unknown method'})",
        cause="LoftQ measures what quantization loses, and needs the full-precision weights",
        hint=f"--model {original}" if original else "give the checkpoint it was made from",
    )


def _original(directory: Path, config: dict[str, Any]) -> str | None:
    try:
        report = load_json(directory / REPORT_FILE)
        return str(report["model"]["id"])
    except (LoftqError, KeyError, TypeError):
        name = config.get("_name_or_path")
        return name if isinstance(name, str) and name else None
