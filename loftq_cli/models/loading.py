"""Loads a model as its users will: plain transformers, and PEFT if an adapter lies beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_DIRECTORY
from loftq_cli.checkpoint.index import open_checkpoint
from loftq_cli.errors import CorruptCheckpoint, LoftqError, UnsupportedModel, first_line
from loftq_cli.models.architecture import read_architecture
from loftq_cli.models.source import read_config


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its tokenizer if it has one, and its adapter's name."""

    model: Any
    tokenizer: Any
    adapter: str | None


def stored_dtype(config: dict[str, Any]) -> str | None:
    """The dtype that config.json records, under its new or its old key."""
    value = config.get("dtype") or config.get("torch_dtype")
    return value if isinstance(value, str) else None


def load_model(
    directory: Path, *, device: str, dtype: str, trust_remote_code: bool = False
) -> LoadedModel:
    """Loads the directory's model, its tokenizer, and `loftq_init/` on top where there is one.

    Args:
        device: `cpu` or `cuda:N`; the whole model goes there.
        dtype: torch's name of the dtype for everything that is not quantized.

    Raises:
        CorruptCheckpoint: the files contradict each other or the model class.
        UnsafeCheckpoint, UnsupportedModel: see `read_architecture`.
    """
    import torch
    from transformers import AutoTokenizer

    config = read_config(directory)
    open_checkpoint(directory)  # its errors name the file; the libraries' often do not
    architecture = read_architecture(directory, config, trust_remote_code=trust_remote_code)
    model_class = type(architecture.model)
    del architecture
    try:
        model = model_class.from_pretrained(
            directory, dtype=getattr(torch, dtype), device_map={"": device}
        )
        adapter = None
        if (directory / ADAPTER_DIRECTORY / ADAPTER_CONFIG).exists():
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, directory, subfolder=ADAPTER_DIRECTORY)
            adapter = ADAPTER_DIRECTORY
    except LoftqError:
        raise
    except Exception as error:  # whatever two large libraries may object to
        raise CorruptCheckpoint(
            f"{directory} cannot be loaded",
            cause=first_line(error),
        ) from error
    tokenizer = None
    if any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    return LoadedModel(model.eval(), tokenizer, adapter)


def require_text_model(loaded: LoadedModel) -> None:
    """Refuses models that cannot write text.

    Raises:
        UnsupportedModel: no tokenizer, or no language-model head.
    """
    base = loaded.model.get_base_model() if loaded.adapter else loaded.model
    if loaded.tokenizer is None:
        raise UnsupportedModel("this model has no tokenizer", cause="there is no tokenizer.json")
    if not base.can_generate():
        raise UnsupportedModel(
            f"{type(base).__name__} does not generate text",
            hint="choose a causal or sequence-to-sequence language model",
        )


def logical_parameters(model: Any) -> int:
    """Weights as the architecture counts them: a packed 4-bit weight has all its elements."""
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        total += parameter.numel() if state is None else state.shape.numel()
    return total
