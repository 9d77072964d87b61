"""The directory as its README says to load it, and one pass through it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from loftq_cli import hardware
from loftq_cli.checkpoint.adapter import ADAPTER_DIRECTORY, ADAPTER_NAME
from loftq_cli.checkpoint.safetensors import read_header
from loftq_cli.checks.battery import Finding, NothingToCheck
from loftq_cli.checks.written.directory import WRITE_AGAIN, Written
from loftq_cli.containers import layer_classes
from loftq_cli.errors import CheckFailed, first_line
from loftq_cli.models.auto_classes import class_named
from loftq_cli.models.loading import keep_layout
from loftq_cli.report.loading import auto_class

if TYPE_CHECKING:
    from torch import Tensor

_TOKENS = 8
# Beside the weights: the libraries, what is read while it is unpacked, the activations.
_ROOM = 1.25


def forward(written: Written) -> Finding:
    """Loads backbone and adapter, looks at their layers, and runs a few inputs through them."""
    import torch

    inputs = _inputs(written.architecture.model, written.claims.results.task_type)
    _require_room(written)
    model = _load(written)
    dtype = model.get_base_model().dtype
    given = {
        name: each.to(written.device, dtype if each.is_floating_point() else None)
        for name, each in inputs.items()
    }
    try:
        with torch.no_grad():
            outputs = model(**given)
    except RuntimeError as error:
        if written.dtype is None:
            raise
        raise CheckFailed(
            f"loaded with dtype={written.dtype} it does not run",
            cause=first_line(error),
            hint=f"load it without a dtype, or make it with loftq quantize --dtype {written.dtype}",
        ) from error
    values = 0
    for name, output in _floats(outputs):
        values += output.numel()
        if not bool(output.isfinite().all()):
            raise CheckFailed(
                f"the model's {name} are NaN or infinite",
                cause=f"{int((~output.isfinite()).sum()):,} of {output.numel():,} values, for an "
                "input that any model of this class takes",
                hint="run the original model on the same dtype: if it does this too, it is not "
                "the quantization",
            )
    shapes = ", ".join(
        f"{name} {list(each.shape)}" for name, each in inputs.items() if name != "attention_mask"
    )
    claims = written.claims
    kind = claims.container.layer_class or "layers as they were"
    return Finding(
        f"{auto_class(claims.results)} and PEFT load it: {len(claims.layers)} {kind}, "
        f"{len(claims.adapted)} with an adapter; {shapes} give {values:,} finite values",
        {"output_values": values},
    )


def _load(written: Written) -> Any:
    """The two lines of the README, and what they made of the layers."""
    import torch
    import transformers
    from peft import PeftModel

    name = auto_class(written.claims.results)
    auto = class_named(name)
    if auto is None:
        raise CheckFailed(
            f"transformers {transformers.__version__} has no model class {name:.80}",
            cause="the report says that it loads this directory",
            hint="pip install -U transformers",
        )
    options: dict[str, Any] = {"trust_remote_code": True} if written.trust_remote_code else {}
    if written.dtype is not None:
        options["dtype"] = getattr(torch, written.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they would warn about is looked at below
        model, info = auto.from_pretrained(
            written.directory,
            device_map={"": written.device},
            output_loading_info=True,
            **options,
        )
        for what in ("missing", "mismatched"):
            keys = sorted(map(str, info[f"{what}_keys"]))
            if keys:
                raise CheckFailed(
                    f"transformers finds {what} weights: {keys[0]}",
                    cause=f"{len(keys)} in all; it would go on, with random numbers for what is "
                    "missing",
                    hint=WRITE_AGAIN,
                )
        _require_layers(written, "quantized", _quantized(model))
        keep_layout(model)
        model = PeftModel.from_pretrained(
            model, written.directory, subfolder=ADAPTER_DIRECTORY, is_trainable=True
        )
    base = model.get_base_model()
    _require_layers(
        written,
        "adapted",
        {name for name, module in base.named_modules() if hasattr(module, "lora_A")},
    )
    return model.eval()


def _quantized(model: Any) -> set[str]:
    kinds = layer_classes()
    return {name for name, module in model.named_modules() if type(module).__name__ in kinds}


def _require_layers(written: Written, how: str, found: set[str]) -> None:
    claims = written.claims
    claimed = {layer.name for layer in (claims.adapted if how == "adapted" else claims.quantized)}
    for name in sorted(found ^ claimed):
        is_not = "is not" if name in claimed else "is"
        says = "is" if name in claimed else "is not"
        raise CheckFailed(
            f"{name} {is_not} {how} in the loaded model",
            cause=f"by the report it {says}",
            hint=WRITE_AGAIN,
        )


def _require_room(written: Written) -> None:
    adapter = read_header(written.directory / ADAPTER_NAME).file_bytes
    needed = int(_ROOM * (written.checkpoint.total_bytes + adapter))
    room, place = hardware.memory_bytes(), "this box"
    if written.device.startswith("cuda"):
        import torch

        room, place = torch.cuda.mem_get_info(written.device)[0], written.device
    if room is not None and needed > room:
        raise NothingToCheck(
            f"the loaded model takes about {needed / 1e9:.3g} GB, and {place} has {room / 1e9:.3g}"
        )


def _inputs(model: Any, task_type: str | None) -> dict[str, Tensor]:
    """A few tokens, or an image of noise.

    Raises:
        NothingToCheck: the class takes something else, or more.
    """
    config, main = model.config, model.main_input_name
    several = any(hasattr(config, f"{each}_config") for each in ("vision", "audio"))
    if main == "pixel_values" and not several:
        return _image(config, type(model).__name__)
    if main != "input_ids" or (several and task_type is None):
        raise NothingToCheck(f"nothing is known about the inputs of {type(model).__name__}")
    return _tokens(config, task_type)


def _tokens(config: Any, task_type: str | None) -> dict[str, Tensor]:
    import torch

    text = config.get_text_config()
    tokens = torch.arange(_TOKENS).mul(7).add(3).remainder(text.vocab_size).view(1, -1)
    end = getattr(text, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < text.vocab_size:
        tokens[0, -1] = end  # where BART's classifiers look
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if task_type == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = tokens[:, : _TOKENS // 2]
    return inputs


def _image(config: Any, name: str) -> dict[str, Tensor]:
    import torch

    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    if not all(isinstance(each, int) for each in (height, width, channels)):
        raise NothingToCheck(f"the config of {name} does not say how large its images are")
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(1, channels, height, width, generator=generator)}


def _floats(outputs: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of numbers among a model's outputs, by name."""
    import torch

    named = outputs.items() if hasattr(outputs, "items") else enumerate(outputs)
    for name, output in named:
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            yield str(name), output
