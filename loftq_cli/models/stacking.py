"""Matrices of experts that a model holds as one stack: how they lie in files, and who loads them.

Files have them one by one (`experts.3.up_proj.weight`), or as a stack too (`experts.gate_up_proj`,
of all experts). From a stack each is read by itself, and written by itself where it is quantized,
by a name that its readers know:

    ruled    transformers has a rule that stacks such names, in the conversion map of the class
    patched  its class holds each expert as layers where it is loaded quantized (Llama 4)
    neither  vLLM reads those of some classes (read in its source for Gemma 4), and loftq itself
             puts them back into stacks (`dequantized.py`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loftq_cli.containers.fused import expert_number, expert_stack
from loftq_cli.models.routed import ExpertPlace

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.core_model_loading import WeightConverter

    from loftq_cli.checkpoint.safetensors import TensorInfo

Shape = tuple[int, ...]

GATE_UP, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"
# By model type, for such as have no rule in the conversion map of their class (transformers 5.24);
# and such whose experts have Mixtral's names.
_UNRULED = {
    "aria", "aria_text", "diffusion_gemma", "diffusion_gemma_text", "gemma4", "gemma4_text",
    "gemma4_unified", "gemma4_unified_text", "gpt_oss", "granitemoe", "granitemoe_swa",
    "granitemoehybrid", "granitemoeshared", "hy_v4", "inkling2_text", "inkling_text", "llama4",
    "llama4_text", "minimax_m3_vl_text", "openai_privacy_filter", "qwen3_vl_moe",
    "qwen3_vl_moe_text", "zaya",
}  # fmt: skip
_LIKE_MIXTRAL = {
    "deepseek_v4", "kimi_linear", "lfm2_moe", "minimax", "minimax_m2", "minimax_m3_vl", "mixtral",
    "phimoe",
}  # fmt: skip
_PATCHED = dict.fromkeys(("llama4", "llama4_text"), ("bitsandbytes", "compressed-tensors"))


@dataclass(frozen=True)
class Stack:
    """How a tensor (experts, …) is taken apart: the matrices of expert N are `path.N.part`.

    Those of an expert lie one below the other; beside each other where the tensor has them
    ``transposed``, as (in, out). ``patched`` are the containers that transformers loads with the
    experts as layers.
    """

    path: str
    parts: tuple[str, ...]
    transposed: bool
    ruled: bool = False
    patched: tuple[str, ...] = ()

    def module(self, index: int) -> str:
        """What a matrix is called by itself."""
        expert, part = divmod(index, len(self.parts))
        return f"{self.path}.{expert}.{self.parts[part]}"


@dataclass(frozen=True)
class Place:
    """Where a matrix lies in the tensor of a ``stack``: at this ``index`` of ``count``."""

    tensor: str
    index: int
    count: int
    stack: Stack

    @property
    def expert(self) -> int:
        return self.index // self.parts

    @property
    def part(self) -> int:
        return self.index % self.parts

    @property
    def parts(self) -> int:
        """How many matrices an expert has in the tensor."""
        return len(self.stack.parts)


@dataclass(frozen=True)
class Restacked:
    """The parameter of a class, of this shape, that a matrix of an expert is put into."""

    shape: Shape
    place: Place

    def part_of(self, stack: Tensor) -> Tensor:
        """The matrix (out, in) in that parameter."""
        place = self.place
        matrix = stack[place.expert]
        turned = matrix.t() if place.stack.transposed else matrix
        return turned.chunk(place.parts)[place.part]


def stack_by_names(
    tensor: str, shapes: Mapping[str, Shape], model_types: Iterable[str]
) -> Stack | None:
    """How the tensor is taken apart; ``shapes`` has those of all stacks. None: it is not."""
    path, _, name = tensor.rpartition(".")
    if expert_stack(tensor) != path or name not in (GATE_UP, UP, DOWN) or len(shapes[tensor]) != 3:
        return None
    transposed = _is_transposed({each: shapes.get(f"{path}.{each}") for each in (GATE_UP, DOWN)})
    types = {*model_types}
    if _UNRULED & types:
        patched = next((_PATCHED[each] for each in sorted(types & _PATCHED.keys())), ())
        parts = _parts(path, name, shapes)
        return None if transposed is None else Stack(path, parts, transposed, patched=patched)
    if transposed:
        return None
    parts = _parts(path, name, {})
    if _LIKE_MIXTRAL & types:
        parts = ("w2",) if name == DOWN else ("w1", "w3")
    return Stack(path, parts, transposed=False, ruled=True)


class ModelStacks:
    """The stacks of a model class, by its parameters and the rules of its conversion map.

    ``parameter_of`` gives the parameter that a tensor of files becomes, and the pattern of the rule
    that makes it a part of that, if one does.
    """

    def __init__(
        self,
        model: Any,
        state: Mapping[str, Tensor],
        rules: Iterable[WeightConverter],
        parameter_of: Callable[[str], tuple[str, str | None]],
    ) -> None:
        self._shapes = {
            name: tuple(each.shape)
            for name, each in state.items()
            if each.ndim == 3 and expert_stack(name) is not None
        }
        self._biases = {name: tuple(state[name].shape) for name in state if name.endswith("_bias")}
        self._rules = list(rules)
        self._parameter_of = parameter_of
        self._ruled = {parameter: self._ruled_parts(parameter) for parameter in self._shapes}
        paths = {expert_stack(parameter) or "" for parameter in self._shapes}
        self._patched = {path: _patched(model.get_submodule(path)) for path in paths}
        # By the names that loftq gives to matrices for which the class has no rule.
        self._own: dict[tuple[str, str], tuple[str, Stack]] = {}
        for parameter in self._shapes:
            stack = self._as_held(parameter)
            if stack is not None and not self._ruled[parameter]:
                self._own |= {(stack.path, part): (parameter, stack) for part in stack.parts}

    def expert_shape(self, tensor: str) -> tuple[int, int] | None:
        """(out, in) of an expert's matrix in the files; None: the tensor is none."""
        if (restacked := self.restacked(tensor)) is not None:
            place, (_, rows, columns) = restacked.place, restacked.shape
            if place.stack.transposed:
                rows, columns = columns, rows
            return rows // place.parts, columns
        parameter, source = self._parameter_of(tensor)
        if source is None or parameter not in self._shapes:
            return None
        return stacked_shape(tensor, self._shapes[parameter], self._rule(source))

    def ruled_place(self, tensor: str) -> ExpertPlace | None:
        """Where a rule puts an expert's matrix; None: none makes the tensor a part of a stack."""
        parameter, source = self._parameter_of(tensor)
        expert = expert_number(tensor.removesuffix(".weight"))
        if source is None or expert is None or self.expert_shape(tensor) is None:
            return None
        parts = list(self._rule(source).source_patterns)
        path, _, name = parameter.rpartition(".")
        return ExpertPlace(path, name, expert, parts.index(source), len(parts))

    def expert_place(self, tensor: str) -> ExpertPlace | None:
        """Where the model holds an expert's matrix of the files; None: the tensor is none."""
        if (restacked := self.restacked(tensor)) is None:
            return self.ruled_place(tensor)
        place = restacked.place
        path, _, name = place.tensor.rpartition(".")
        return ExpertPlace(path, name, place.expert, place.part, place.parts)

    def restacked(self, tensor: str) -> Restacked | None:
        """Where a matrix goes that only loftq knows by this name; None: it is none."""
        module = tensor.removesuffix(".weight")
        path = expert_stack(module)
        number, _, part = module.removeprefix(f"{path}.").partition(".")
        found = self._own.get((path or "", part))
        if found is None or module == tensor or not (number.isascii() and number.isdecimal()):
            return None
        parameter, stack = found
        shape, parts = self._shapes[parameter], len(stack.parts)
        count, index = shape[0] * parts, int(number) * parts + stack.parts.index(part)
        if index >= count or stack.module(index) != module:
            return None
        return Restacked(shape, Place(parameter, index, count, stack))

    def patched(self, tensor: str) -> tuple[str, ...]:
        """The containers with which the class holds an expert's matrix as a layer of its own."""
        return self._patched.get(expert_stack(tensor.removesuffix(".weight")) or "", ())

    def stack_of(self, info: TensorInfo) -> Stack | None:
        """How a tensor of files is taken apart; None: it is no stack, or no class would put it
        together again."""
        parameter, source = self._parameter_of(info.name)
        if parameter not in self._shapes:
            return None
        shape = self._shapes[parameter]
        if parts := self._ruled[parameter]:
            as_held = source is None and info.shape == shape
            path = expert_stack(parameter) or ""
            return Stack(path, parts, transposed=False, ruled=True) if as_held else None
        if (stack := self._as_held(parameter)) is None:
            return None
        turns = source is not None and self._turns(source)
        if info.shape == shape and (turns or source is None):
            return stack
        if info.shape != (shape[0], shape[2], shape[1]) or not turns:
            return None
        return replace(stack, transposed=not stack.transposed)

    def _as_held(self, parameter: str) -> Stack | None:
        """How the class itself has the matrices; None where that cannot be told."""
        path, _, name = parameter.rpartition(".")
        pair = {each: self._shapes.get(f"{path}.{each}") for each in (GATE_UP, DOWN)}
        transposed = _is_transposed(pair)
        if name not in pair or transposed is None:
            return None
        parts = _parts(path, name, self._biases)
        return Stack(path, parts, transposed, patched=self._patched[path])

    def _ruled_parts(self, parameter: str) -> tuple[str, ...]:
        """What the class's rule calls the matrices of a stack, in order; empty: it has none."""
        path = expert_stack(parameter)
        for rule in self._rules:
            sources = rule.source_patterns
            parts = [each.removesuffix(".weight").rpartition(".")[2] for each in sources]
            names = [f"{path}.0.{part}.weight" for part in parts]
            found = [self._parameter_of(name) for name in names]
            if found == [(parameter, source) for source in sources] and stacked_shape(
                names[0], self._shapes[parameter], rule
            ):
                return tuple(parts)
        return ()

    def _turns(self, source: str) -> bool:
        """Whether the rule of this pattern turns matrices that lie otherwise, and does no more."""
        from transformers.core_model_loading import Transpose

        (*others, step) = self._rule(source).operations
        return not others and isinstance(step, Transpose) and step.check_dims

    def _rule(self, source: str) -> WeightConverter:
        return next(rule for rule in self._rules if source in rule.source_patterns)


def _patched(module: Any) -> tuple[str, ...]:
    """The containers for which transformers puts layers in the place of such a module.

    It knows it by the name of its class.
    """
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

    patch = MODULES_TO_PATCH_FOR_QUANTIZATION.get(type(module).__name__, {})
    return tuple(sorted(str(each.value) for each in patch.get("quantization_methods", ())))


def stacked_shape(tensor: str, stack: Shape, rule: WeightConverter) -> tuple[int, int] | None:
    """(out, in) of an expert's matrix that ``rule`` makes a part of ``stack``; None: it is none.

    It is one if transformers does no more with it than to stack it, with those of the other
    experts, and to put the stacks of gate and up one below the other.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist

    if not tensor.endswith(".weight") or expert_stack(tensor.removesuffix(".weight")) is None:
        return None
    parts = len(rule.source_patterns)
    steps = [(type(step), getattr(step, "dim", None)) for step in rule.operations]
    below = [(Concatenate, 1)] if parts > 1 else []
    if steps != [(MergeModulelist, 0), *below]:
        return None
    _, rows, columns = stack
    return rows // parts, columns


def _parts(path: str, name: str, tensors: Mapping[str, Any]) -> tuple[str, ...]:
    """What an expert has in a stack of this name: gate and up are two matrices.

    Not where they have one bias: it goes with both, and they may lie in turns (gpt-oss).
    """
    if name == GATE_UP and f"{path}.{name}_bias" not in tensors:
        return "gate_proj", "up_proj"
    return (name,)


def _is_transposed(pair: Mapping[str, Shape | None]) -> bool | None:
    """Whether a pair of stacks has (in, out), by what is twice as wide; None: it is no pair."""
    gate_up, down = pair[GATE_UP], pair[DOWN]
    if gate_up is None or down is None or len(gate_up) != 3 or len(down) != 3:
        return None
    if gate_up[0] != down[0]:
        return None
    if (gate_up[1], gate_up[2]) == (2 * down[2], down[1]):
        return False
    return True if (gate_up[2], gate_up[1]) == (2 * down[1], down[2]) else None
