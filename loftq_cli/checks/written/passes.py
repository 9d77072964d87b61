"""One pass through a model with its adapter, forth and back, and what it did not reach."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loftq_cli.checks.written.inputs import Inputs, Unknown, inputs_of
from loftq_cli.containers import holds_codes
from loftq_cli.errors import CheckFailed, first_line

if TYPE_CHECKING:
    from torch import Tensor

_TRY_THE_ORIGINAL = (
    "run the original model on the same dtype: if it does this too, it is not the quantization"
)
# What a library says of inputs, dtypes or arguments that do not fit.
_DOES_NOT_RUN = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)


@dataclass(frozen=True)
class Passed:
    """What went through, how many numbers came out, how many adapters got a gradient.

    ``notes`` say what of the model was not run, and why adapters have no gradient.
    """

    inputs: Inputs
    values: int
    reached: int
    notes: list[str]


def run_through(model: Any, auto: str, *, device: str, asked_dtype: str | None = None) -> Passed:
    """Runs a PEFT model, whose class ``auto`` opens, with labels where it takes them.

    Raises:
        CheckFailed: it does not run, or gives what is no number, or trains nothing, or nothing is
            known about its inputs.
    """
    adapters = adapters_of(model.get_base_model())
    called: set[str] = set()
    for name, module in adapters.items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    # Whatever was called before, to count an image's tokens, is called again.
    model.get_base_model().register_forward_pre_hook(lambda *_: called.clear())
    try:
        inputs, values = _run(model, auto, device)
    except Unknown as reason:
        kind = type(model.get_base_model()).__name__
        raise CheckFailed(
            f"not run: nothing is known about the inputs of {kind}",
            cause=str(reason),
            hint="run the lines of its README on inputs of your own",
        ) from None
    except _DOES_NOT_RUN as error:
        asked, hint = "", _TRY_THE_ORIGINAL
        if asked_dtype is not None:
            asked = f"with dtype={asked_dtype} "
            again = f"loftq quantize --dtype {asked_dtype}"
            hint = f"load it without a dtype, or make it with {again}"
        raise CheckFailed(
            f"loaded {asked}it does not run", cause=first_line(error), hint=hint
        ) from error
    reached, idle, notes = _gradients(adapters, called)
    _require_no_raw_reading(model, inputs, device, {name: adapters[name] for name in idle})
    return Passed(
        inputs, values, reached, [*(f"not run: {what}" for what in inputs.not_run), *notes]
    )


def _run(model: Any, auto: str, device: str) -> tuple[Inputs, int]:
    """What was run, and how many numbers it gave.

    Where a model does not take our image beside a text, text alone has to do.
    """
    base = model.get_base_model()
    try:
        inputs = inputs_of(base, auto)
    except _DOES_NOT_RUN as error:  # a setting that its config does not have: no word on the model
        raise Unknown(first_line(error)) from error
    try:
        return inputs, _forth_and_back(model, inputs, device)
    except _DOES_NOT_RUN as error:
        if not {"pixel_values", "input_ids"} <= inputs.tensors.keys():
            raise
        model.zero_grad()
        text = inputs_of(base, auto, images=False)
        text = replace(text, not_run=[f"images ({first_line(error)})", *text.not_run])
        return text, _forth_and_back(model, text, device)


def _forth_and_back(model: Any, inputs: Inputs, device: str) -> int:
    """The number of outputs, all of them finite; adapters have their gradients after it."""
    import torch

    base = model.get_base_model()
    given: dict[str, Any] = inputs.on(device, base.dtype)
    if "use_cache" in inspect.signature(base.forward).parameters:
        given["use_cache"] = False  # as in training
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = model(**given)
        values = _require_finite(outputs)
        target = _target(outputs)
        if not target.requires_grad:
            raise CheckFailed("no adapter gets a gradient", hint=_TRY_THE_ORIGINAL)
        target.backward()
    return values


def adapters_of(base: Any) -> dict[str, Any]:
    """The layers with an adapter; those on parameters, as of experts, are none."""
    return {
        name: module
        for name, module in base.named_modules()
        if hasattr(module, "lora_A") and not hasattr(module, "parameter_name")
    }


def _require_finite(outputs: Any) -> int:
    """How many numbers a model gave, all of them finite."""
    values = 0
    for name, output in _floats(outputs):
        values += output.numel()
        if not bool(output.isfinite().all()):
            raise CheckFailed(
                f"the model's {name} are NaN or infinite",
                cause=f"{int((~output.isfinite()).sum()):,} of {output.numel():,} values, for an "
                "input that any model of this class takes",
                hint=_TRY_THE_ORIGINAL,
            )
    return values


def _target(outputs: Any) -> Tensor:
    """The loss; without one a sum of all outputs, each with a weight of its own."""
    import torch

    if (loss := getattr(outputs, "loss", None)) is not None:
        found: Tensor = loss.sum()
        return found
    generator = torch.Generator().manual_seed(0)
    terms = [
        (each.float() * torch.randn(each.shape, generator=generator).to(each.device)).sum()
        for _, each in _floats(outputs)
    ]
    return torch.stack(terms).sum()


def _gradients(adapters: dict[str, Any], called: set[str]) -> tuple[int, list[str], list[str]]:
    """How many adapters a finite gradient reached, those that nothing called, and notes on all
    that were not reached.

    Some layers need inputs of their own: experts, towers for what was not tried, attention to an
    encoder that is not there. Of others the model drops what they give.
    """
    reached, idle, unused, notes = 0, [], [], []
    for name, module in adapters.items():
        gradients = [
            parameter.grad
            for matrices in (module.lora_A, module.lora_B)
            for parameter in matrices.parameters()
        ]
        found = [each for each in gradients if each is not None]
        if not all(bool(each.isfinite().all()) for each in found):
            raise CheckFailed(
                f"the gradient of the adapter of {name} is NaN or infinite", hint=_TRY_THE_ORIGINAL
            )
        if len(found) == len(gradients):
            reached += 1
        elif name in called:
            unused.append(name)
        else:
            idle.append(name)
    if adapters and not reached:
        raise CheckFailed("no adapter gets a gradient", hint=_TRY_THE_ORIGINAL)
    for what, names in (("to which no input went", idle), ("whose output is not used", unused)):
        if names:
            count = f"{len(names)} adapters" if len(names) > 1 else "the adapter"
            notes.append(f"without gradient: {count} of layers {what}, such as {names[0]}")
    return reached, idle, notes


def _require_no_raw_reading(model: Any, inputs: Inputs, device: str, idle: dict[str, Any]) -> None:
    """A model that multiplies by a layer's weight itself goes past the layer's adapter.

    One in 4 bits could not be multiplied by. Of any other, a gradient shows it.
    """
    weights = {
        name: module.base_layer.weight
        for name, module in idle.items()
        if not holds_codes(module.base_layer) and module.base_layer.weight.is_floating_point()
    }
    if not weights:
        return
    for weight in weights.values():
        weight.requires_grad_(True)
    _forth_and_back(model, inputs, device)
    for name, weight in weights.items():
        if weight.grad is not None:
            raise CheckFailed(
                f"the adapter of {name} takes no part in a forward pass",
                cause="the model never calls that layer, and reads its weight by itself",
                hint="make it again without an adapter there (loftq quantize --target-modules)",
            )


def _floats(outputs: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of numbers among a model's outputs, by name."""
    import torch

    named = outputs.items() if hasattr(outputs, "items") else enumerate(outputs)
    for name, output in named:
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            yield str(name), output
