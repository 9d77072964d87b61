"""The directory as its README says to load it, and one pass through it, forth and back."""

from __future__ import annotations

import warnings
from typing import Any

from loftq_cli import hardware
from loftq_cli.checkpoint.adapter import ADAPTER_DIRECTORY
from loftq_cli.checks.battery import Finding, NothingToCheck
from loftq_cli.checks.written.directory import Written
from loftq_cli.checks.written.passes import adapters_of, run_through
from loftq_cli.containers import holds_codes
from loftq_cli.errors import CheckFailed, told_as
from loftq_cli.models.adapters import attach_fresh
from loftq_cli.models.auto_classes import class_named
from loftq_cli.models.dtypes import stored_dtype
from loftq_cli.models.loading import keep_layout, load_model
from loftq_cli.report.loading import (
    auto_class,
    for_other_readers,
    keeps_adapter_dtype,
    quantization,
    why_not_by_transformers,
)

# Beside the weights: the libraries, what is read while it is unpacked, the activations.
_ROOM = 1.25


def forward(written: Written) -> Finding:
    """Loads backbone and adapter, and runs a few inputs through them, forth and back."""
    _require_loadable(written)
    _require_room(written)
    model = _load(written)
    done = run_through(
        model, written.architecture.auto_class, device=written.device, asked_dtype=written.dtype
    )
    inputs = done.inputs
    shapes = ", ".join(
        f"{name} {list(each.shape)}"
        for name, each in inputs.tensors.items()
        if name != "attention_mask"
    )
    claims = written.claims
    kind = claims.container.layer_class or "layers as they were"
    labels = f" with {' and '.join(inputs.labels)}" if inputs.labels else ""
    loader = "loftq_cli.load" if for_other_readers(claims.results) else auto_class(claims.results)
    return Finding(
        f"{loader} and PEFT load it: {len(claims.layers)} {kind}, "
        f"{len(claims.adapted) or 'each'} with {'an' if claims.adapted else 'a new'} adapter; "
        f"{shapes}{labels} give {done.values:,} finite "
        f"values, and {done.reached} adapters a finite gradient",
        {"output_values": done.values, "adapters_with_gradient": done.reached},
        notes=done.notes,
    )


def _load(written: Written) -> Any:
    """As its README says, and what that made of the layers."""
    if for_other_readers(written.claims.results):
        with told_as(CheckFailed, "loftq_cli.load cannot load it", hint=written.remedy):
            model = load_model(
                written.directory,
                device=written.device,
                dtype=written.dtype or stored_dtype(written.config) or "float32",
                trainable=bool(written.claims.adapted),
                trust_remote_code=written.trust_remote_code,
            ).model
        if not written.claims.adapted:
            layers = (each.name for each in written.claims.layers)
            linear = [name for name in layers if name not in written.experts]
            return _with_a_new_adapter(written, model, linear)
        _require_layers(written, "adapted", set(adapters_of(model.get_base_model())))
        return model
    return _load_by_transformers(written)


def _load_by_transformers(written: Written) -> Any:
    """The README's lines: the same calls in the same order, and what they made of the layers."""
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
    options: dict[str, Any] = {}
    if (told := quantization(written.claims.results)) is not None:
        kind, arguments = told
        options["quantization_config"] = getattr(transformers, kind)(**arguments)
    if written.trust_remote_code:
        options["trust_remote_code"] = True
    if written.dtype is not None:
        options["dtype"] = getattr(torch, written.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they would warn about is looked at below
        with told_as(CheckFailed, "transformers cannot load it", hint=written.remedy):
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
                    hint=written.remedy,
                )
        if written.claims.container.stays_packed:
            _require_layers(written, "quantized", _quantized(model))
        keep_layout(model)
        if not written.claims.adapted:
            modules = [layer.name for layer in written.claims.layers]
            return _with_a_new_adapter(written, model, modules)
        with told_as(CheckFailed, "PEFT cannot put the adapter on it", hint=written.remedy):
            model = PeftModel.from_pretrained(
                model,
                written.directory,
                subfolder=ADAPTER_DIRECTORY,
                is_trainable=True,
                autocast_adapter_dtype=not keeps_adapter_dtype(written.claims.results),
            )
    _require_layers(written, "adapted", set(adapters_of(model.get_base_model())))
    return model.eval()


def _with_a_new_adapter(written: Written, model: Any, modules: list[str]) -> Any:
    """One that changes nothing, as who trains a model without an adapter further has it."""
    with told_as(CheckFailed, "PEFT cannot put an adapter on it", hint=written.remedy):
        return attach_fresh(model, 1, written.claims.results.task_type, modules).eval()


def _quantized(model: Any) -> set[str]:
    return {name for name, module in model.named_modules() if holds_codes(module)}


def _require_layers(written: Written, how: str, found: set[str]) -> None:
    claims = written.claims
    claimed = {layer.name for layer in (claims.adapted if how == "adapted" else claims.quantized)}
    for name in sorted(found ^ claimed):
        is_not = "is not" if name in claimed else "is"
        says = "is" if name in claimed else "is not"
        raise CheckFailed(
            f"{name} {is_not} {how} in the loaded model",
            cause=f"by the report it {says}",
            hint=written.remedy,
        )


def _require_loadable(written: Written) -> None:
    container = written.claims.container
    if missing := container.missing_libraries():
        names = " ".join(name.replace("_", "-") for name in missing)
        raise NothingToCheck(
            f"transformers loads {container.name} with {' and '.join(container.libraries)}: "
            f"pip install {names}"
        )
    if (reason := why_not_by_transformers(written.claims.results)) is not None:
        told = ", ".join(map(str, sorted({layer.bits for layer in written.claims.quantized})))
        raise NothingToCheck(f"transformers does not load {told} bits of it here: {reason}")


def _require_room(written: Written) -> None:
    adapter = written.adapter_header
    held = 0 if adapter is None else adapter.file_bytes
    needed = int(_ROOM * (written.checkpoint.total_bytes + held))
    room, place = hardware.memory_bytes(), "this box"
    if written.device.startswith("cuda"):
        import torch

        room, place = torch.cuda.mem_get_info(written.device)[0], written.device
    if room is not None and needed > room:
        raise NothingToCheck(
            f"the loaded model takes about {needed / 1e9:.3g} GB, and {place} has {room / 1e9:.3g}"
        )
