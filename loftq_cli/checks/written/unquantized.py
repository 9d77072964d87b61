"""A directory with an adapter on weights that were left as they are: nothing in it is quantized."""

from __future__ import annotations

from loftq_cli.checkpoint.safetensors import shown
from loftq_cli.checkpoint.tensors import load_tensor
from loftq_cli.checks.battery import Finding
from loftq_cli.checks.written.directory import WRITE_AGAIN, ClaimedLayer, Written
from loftq_cli.checks.written.stored import not_as_reported
from loftq_cli.errors import CheckFailed
from loftq_cli.models.source import CONFIG_FILE


def unquantized(written: Written) -> Finding:
    """No sign of a quantization, and every layer of the report with finite numbers."""
    if written.config.get("quantization_config") is not None:
        raise CheckFailed(
            f"{CONFIG_FILE} does not describe what is stored",
            cause="it has a quantization_config, and by the report nothing is quantized",
            hint=WRITE_AGAIN,
        )
    for module, tensor in written.weights.items():
        raise CheckFailed(
            f"{module} is stored quantized, and by the report it is not",
            cause=f"there are scales for {shown(tensor)}",
            hint=WRITE_AGAIN,
        )
    values = 0
    for layer in written.claims.layers:
        written.progress.start(layer.name)
        values += _layer(written, layer)
        written.progress.advance(layer.name)
    return Finding(
        f"{len(written.claims.layers)} layers are stored as they were, {values:,} finite weights; "
        "nothing is quantized, and the config says nothing else",
        {"layers": len(written.claims.layers), "values": values},
    )


def _layer(written: Written, layer: ClaimedLayer) -> int:
    import torch

    found = written.plain_layers.get(layer.name)
    if found is None:
        raise not_as_reported(layer, "no weight file has a weight of it")
    shape = (found.out_features, found.in_features)
    if shape != layer.shape:
        raise not_as_reported(
            layer, f"{shown(found.tensor)} is {list(shape)}, not {list(layer.shape)}"
        )
    weight = load_tensor(*written.checkpoint.tensors[found.tensor])
    if not bool(torch.isfinite(weight).all()):
        raise not_as_reported(layer, f"{shown(found.tensor)} has NaN or infinity")
    return shape[0] * shape[1]
