"""A model without its weights: the class that a config names, with numbers as before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loftq_cli.errors import UnsupportedModel
from loftq_cli.models.architecture import read_architecture
from loftq_cli.models.known import known_model
from loftq_cli.models.loading import Clock, LoadedModel, load_tokenizer
from loftq_cli.models.outline import Outline
from loftq_cli.models.source import CONFIG_FILE, read_config


def random_model(
    directory: Path | None,
    name: str,
    *,
    device: str,
    dtype: str,
    trust_remote_code: bool = False,
    clock: Clock,
) -> LoadedModel:
    """The model of the directory's config.json; of the shipped table's ``name`` if that is None.

    Raises:
        UnsupportedModel: the config is that of a quantized model, or the table has not all of it.
    """
    with clock("import"):
        import torch
        from transformers import modeling_utils  # noqa: F401
    with clock("build"):
        if directory is None:
            meta, tokenizer = _known(name), None
        else:
            config = read_config(directory)
            if "quantization_config" in config:
                raise UnsupportedModel(
                    "a quantized model cannot have random weights",
                    cause=f"{directory / CONFIG_FILE} has a quantization_config",
                    hint="give the config of the model that it was made from",
                )
            architecture = read_architecture(directory, config, trust_remote_code=trust_remote_code)
            meta, tokenizer = architecture.model, load_tokenizer(directory, trust_remote_code)
        torch.manual_seed(0)
        with torch.device(device):
            model = type(meta)._from_config(meta.config, dtype=getattr(torch, dtype))
    return LoadedModel(model.eval(), tokenizer, None)


def _known(name: str) -> Any:
    """The class of a known model on the meta device.

    The table has shapes, not configs; where the class's own default config leads to the same
    shapes, as for GPT-2 and Llama 2 7B, it is that model's.
    """
    import torch
    import transformers

    known = known_model(name)
    assert known is not None, "the caller has looked"
    _, outline = known
    model_class = getattr(transformers, outline.architecture)
    with torch.device("meta"):
        model = model_class(model_class.config_class())
    if not _is(model, outline):
        raise UnsupportedModel(
            f"'{name}' cannot be built without its config",
            cause=f"the shipped table has its shapes, and those of {outline.architecture}'s "
            "default config are others",
            hint=f"give a directory that has its {CONFIG_FILE}, or one of the sizes that the "
            "libraries default to, such as gpt2",
        )
    return model


def _is(model: Any, outline: Outline) -> bool:
    """Whether the model has exactly the outline's parameters and linear layers."""
    if sum(each.numel() for each in model.parameters()) != outline.parameters:
        return False
    weights = dict(model.named_parameters())
    return all(
        (weight := weights.get(f"{layer.module}.weight")) is not None
        and sorted(weight.shape) == sorted((layer.out_features, layer.in_features))
        for layer in outline.layers
    )
