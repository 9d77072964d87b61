"""Parameters that all experts of a block are held as, and where PEFT has their adapters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from loftq_cli.checkpoint.adapter import PREFIX


def adapter_modules(model: Any, parameters: Collection[str]) -> dict[str, str]:
    """Where A and B are of these ``parameters`` of a model, if all of them have some.

    PEFT wraps a module once for each of its parameters, in the order in which it has them: A and B
    of the last are at the module itself, those of the others below as many `base_layer`.
    """
    found = {}
    for parameter in parameters:
        path, _, name = parameter.rpartition(".")
        held = model.get_submodule(path).named_parameters(recurse=False)
        adapted = [each for each, _ in held if f"{path}.{each}" in parameters]
        found[parameter] = path + ".base_layer" * (len(adapted) - 1 - adapted.index(name))
    return {parameter: f"{PREFIX}{module}" for parameter, module in found.items()}


def is_targeted(parameter: str, targets: Sequence[str]) -> bool:
    """Whether one of PEFT's `target_parameters` is the parameter's name, or the end of it."""
    return any(parameter == target or parameter.endswith(f".{target}") for target in targets)
