"""Experts in bitsandbytes' 4 bits that stay packed in memory.

Files have them one by one. transformers (5.24) stacks what it reads before it knows that it is
packed, so the model is loaded without its stacks of experts. Each is put in afterwards, the codes
of all its matrices one after the other, through bitsandbytes' own parametrization: that dequantizes
a stack whenever its block is run, and lets go of it after.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from loftq_cli.checkpoint.adapter import ADAPTER_CONFIG
from loftq_cli.checkpoint.index import Checkpoint, load_json
from loftq_cli.checkpoint.safetensors import shown
from loftq_cli.checkpoint.tensors import load_tensor
from loftq_cli.containers.bitsandbytes4 import Bitsandbytes4
from loftq_cli.errors import CorruptCheckpoint, UnsupportedModel, told_as
from loftq_cli.models.architecture import Architecture

# What may lie beside the codes of X, as X.END (`QuantState.as_dict`).
_ENDS = (
    "absmax", "quant_map", "nested_absmax", "nested_quant_map",
    "quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4",
)  # fmt: skip
# bitsandbytes' kernels for GPUs count weights in 32 bits.
_MOST_WEIGHTS = 2**31 - 1

_ADDED_AGAIN = (
    "PEFT (0.21.2) adds an adapter on a parameter that is parametrized already once more in every "
    "forward pass"
)
_INSTEAD = (
    "adapt attention and shared layers alone, or quantize the model with --container "
    "compressed-tensors, whose experts are plain parameters once they are loaded"
)


class _Stack(NamedTuple):
    """The matrices of a stack (experts, rows, columns), in its order.

    That is expert after expert, and of each the ``parts`` that its rows are, from above.
    """

    shape: tuple[int, int, int]
    parts: int
    weights: tuple[str, ...]

    @property
    def matrix(self) -> tuple[int, int]:
        """(out, in) of one."""
        _, rows, columns = self.shape
        return rows // self.parts, columns


@dataclass(frozen=True)
class PackedExperts:
    """The quantized matrices of experts in ``checkpoint``, by the parameter that they become."""

    checkpoint: Checkpoint
    stacks: Mapping[str, _Stack]

    @property
    def matrices(self) -> int:
        return sum(len(stack.weights) for stack in self.stacks.values())

    def without_stacks(self, model_class: Any) -> Any:
        """``model_class`` of models that have None where the stacks are to be.

        Nothing takes memory for them then, nor makes up numbers.
        """

        def build(model: Any, *arguments: Any, **options: Any) -> None:
            model_class.__init__(model, *arguments, **options)
            for parameter in self.stacks:
                module, name = _place(model, parameter)
                setattr(module, name, None)
                module._is_hf_initialized = True

        named = {"__init__": build, "__module__": model_class.__module__}
        return type(model_class.__name__, (model_class,), named)

    def put_into(self, model: Any, device: str, dtype: str) -> None:
        """Fills in the stacks of a model that was built without them.

        Args:
            dtype: torch's name of the one that the model computes in.

        Raises:
            CorruptCheckpoint: a matrix is not whole, or not of the shape that the model has.
        """
        import torch
        from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized
        from torch.nn.utils.parametrize import register_parametrization

        computed = getattr(torch, dtype)
        # Q rounded to the dtype that the files have it in, then in that of the products.
        in_dtype = torch.nn.Module()
        in_dtype.forward = partial(torch.Tensor.to, dtype=computed)
        for parameter, stack in self.stacks.items():
            module, name = _place(model, parameter)
            codes, state = self._stacked(stack, device)
            setattr(module, name, torch.nn.Parameter(codes, requires_grad=False))
            replace_parameter_4bit_prequantized(
                module, name, state.as_dict(packed=True), torch.device(device)
            )
            if state.dtype != computed:
                register_parametrization(module, name, in_dtype, unsafe=True)
            held = module.parametrizations[name]
            held.original.quant_state = held[0].quant_state  # as Params4bit has it, to be counted
            module.register_forward_pre_hook(partial(_refuse_what_is_added_again, name))

    def _stacked(self, stack: _Stack, device: str) -> tuple[Any, Any]:
        """The codes (bytes, 1) of a stack, and the QuantState that they are read with.

        Scales are float32 there: each matrix that has them quantized has an offset of its own.
        """
        import torch
        from bitsandbytes.functional import QuantState

        codes = torch.empty(math.prod(stack.shape) // 2, 1, dtype=torch.uint8, device=device)
        absmax, filled, first = [], 0, None
        for weight in stack.weights:
            packed, scales, state = self._matrix(weight, stack.matrix, device)
            first = first or state
            for what in ("blocksize", "quant_type", "dtype"):
                if getattr(state, what) != getattr(first, what):
                    raise _damaged(weight, f"its {what} is not that of {shown(stack.weights[0])}")
            codes[filled : filled + len(packed)] = packed
            filled += len(packed)
            absmax.append(scales)
        assert first is not None
        whole = torch.Size(stack.shape)
        return codes, QuantState(
            torch.cat(absmax), whole, first.code, first.blocksize, first.quant_type, first.dtype
        )

    def _matrix(self, weight: str, shape: tuple[int, int], device: str) -> tuple[Any, Any, Any]:
        """Codes (bytes, 1), scales in float32, and the QuantState of one expert's matrix."""
        import torch
        from bitsandbytes.functional import QuantState, dequantize_blockwise

        tensors = self.checkpoint.tensors
        names = [name for end in _ENDS if (name := f"{weight}.{end}") in tensors]
        with told_as(CorruptCheckpoint, f"{shown(weight)} is damaged"):
            beside = {name: load_tensor(*tensors[name]) for name in names}
            state = QuantState.from_dict(beside, device=torch.device(device))
            packed = load_tensor(*tensors[weight]).view(torch.uint8).reshape(-1, 1).to(device)
            scales = state.absmax
            if state.nested:
                with torch.compiler.set_stance("force_eager"):  # as bitsandbytes' dequantize_4bit
                    scales = dequantize_blockwise(scales, state.state2) + state.offset
        found, elements = tuple(state.shape or ()), math.prod(shape)
        if found != shape or len(packed) * 2 != elements:
            raise _damaged(weight, f"it is {list(found)}, and the model's are {list(shape)}")
        if len(scales) * state.blocksize != elements:
            raise _damaged(
                weight, f"it has {len(scales)} scales, one for {state.blocksize} of its weights"
            )
        return packed, scales.float(), state


def packed_experts(architecture: Architecture, checkpoint: Checkpoint) -> PackedExperts | None:
    """The experts of a checkpoint that are in bitsandbytes' 4 bits; None: there are none.

    Raises:
        UnsupportedModel: only a part of a stack is, or there are more weights in it than
            bitsandbytes can count.
    """
    found: dict[str, dict[tuple[int, int], str]] = {}
    for weight in Bitsandbytes4.weights_in(checkpoint.tensors):
        if (place := architecture.stacks.ruled_place(weight)) is not None:
            matrices = found.setdefault(f"{place.module}.{place.parameter}", {})
            matrices[place.expert, place.part] = weight
    stacks = {
        parameter: _stack(parameter, architecture.model.get_parameter(parameter).shape, weights)
        for parameter, weights in found.items()
    }
    return PackedExperts(checkpoint, stacks) if stacks else None


def _stack(
    parameter: str, shape: tuple[int, int, int], weights: Mapping[tuple[int, int], str]
) -> _Stack:
    """``weights`` by the number of the expert, and that of the part."""
    experts, rows, columns = shape
    parts = 1 + max(part for _, part in weights)
    if [*itertools.product(range(experts), range(parts))] != sorted(weights):
        raise UnsupportedModel(
            f"{parameter} cannot be put together",
            cause=f"{len(weights)} of its {experts * parts} matrices are quantized, and a model "
            "holds them as one",
            hint="quantize the model again with --experts quantize",
        )
    if math.prod(shape) > _MOST_WEIGHTS:
        raise UnsupportedModel(
            f"{parameter} is too large to stay packed",
            cause=f"it has {math.prod(shape):,} weights, and bitsandbytes counts in 32 bits",
            hint="quantize the model with --container compressed-tensors",
        )
    in_order = tuple(weights[place] for place in sorted(weights))
    return _Stack((experts, rows, columns), parts, in_order)


def require_no_adapter_on_experts(adapter: Path) -> None:
    """Refuses an adapter on parameters, which stacks of experts are.

    Over packed ones PEFT finds no place for it by the end of their names, and by whole names it
    would add it again and again.

    Raises:
        UnsupportedModel: the adapter in this directory is such a one.
    """
    path = adapter / ADAPTER_CONFIG
    if path.is_file() and (named := load_json(path).get("target_parameters")):
        raise UnsupportedModel(
            f"the adapter in {adapter} is on experts, and those of this model stay packed",
            cause=f"its target_parameters are {named!r:.100}; {_ADDED_AGAIN}",
            hint=_INSTEAD,
        )


def _refuse_what_is_added_again(name: str, module: Any, inputs: Any) -> None:
    """Before a forward pass: an adapter of the last one is still there, beside that of this one."""
    times = sum(type(each).__module__.startswith("peft.") for each in module.parametrizations[name])
    if times > 1:
        raise UnsupportedModel(
            f"an adapter on packed experts ({name}) would be added {times} times now",
            cause=_ADDED_AGAIN,
            hint=_INSTEAD,
        )


def _place(model: Any, parameter: str) -> tuple[Any, str]:
    """The module that holds a parameter, and what it is called there."""
    path, _, name = parameter.rpartition(".")
    return model.get_submodule(path), name


def _damaged(weight: str, cause: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"{shown(weight)} is damaged", cause=cause, hint="quantize or download the model again"
    )
