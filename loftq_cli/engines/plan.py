"""The plan of a `quantize` run: pure data, made from headers and config alone.

A plan says which tensor goes into which output file, and in what form. Each output file is one
task: it depends on its input tensors and on nothing else, so tasks can run in any order, in one
process or many, and again after a crash.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loftq_cli.checkpoint import adapter
from loftq_cli.checkpoint.writer import PlannedTensor
from loftq_cli.containers.base import Container, Weight
from loftq_cli.containers.fused import expert_stack
from loftq_cli.engines.expert_stacks import ExpertStack, expert_stacks, is_of_experts
from loftq_cli.engines.settings import Settings
from loftq_cli.engines.shards import shards
from loftq_cli.errors import InvalidSetting, UnknownTargetModule, UnsupportedModel
from loftq_cli.formats import ALL_LINEAR, SHORT_NAMES
from loftq_cli.models.layers import (
    ROUTER,
    STACKED_EXPERTS,
    UNRULED_EXPERTS,
    Inventory,
    LeftTensor,
    LinearLayer,
    block_of,
    last_part,
)
from loftq_cli.models.stacking import ModelStacks, Stack

if TYPE_CHECKING:
    from loftq_cli.models.architecture import Architecture

NOT_A_TARGET = "not among --target-modules"
ADAPTED_TOGETHER = "an expert: its adapter is one of the parameter that holds all of them"


@dataclass(frozen=True)
class PlannedLayer:
    """A linear layer in ``bits`` bits, with an adapter of rank ``rank`` or, at 0, without one.

    ``reason`` says why there is none.
    """

    layer: LinearLayer
    bits: int
    rank: int
    padding: int = 0  # rows of A and columns of B beside those that are computed
    reason: str = ""

    @property
    def tensor(self) -> str:
        """Its weight's name in the checkpoint."""
        return self.layer.tensor

    @property
    def adapted(self) -> bool:
        """Whether it gets A and B."""
        return self.rank > 0

    @property
    def stored_rank(self) -> int:
        """Of A and B in the file."""
        return self.rank + self.padding

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.out_features, self.layer.in_features

    @property
    def weight(self) -> Weight:
        """What a container needs to know of it."""
        layer = self.layer
        return Weight(
            layer.tensor, layer.module, self.shape, self.bits, layer.dtype, layer.transposed
        )


@dataclass(frozen=True)
class GatheredInputs:
    """What another process has seen of a layer's inputs: files of the directory that is written.

    ``drift_energy`` is E‖W·(x − x̃)‖², which is the layer's own.
    """

    file_names: tuple[str, ...]
    drift_energy: float


@dataclass(frozen=True)
class Task:
    """One output file: layers to quantize and tensors to copy, in the checkpoint's order.

    ``inputs`` are those of its one layer where that is to be calibrated, and not in the process
    that has the model.
    """

    file_name: str
    entries: tuple[PlannedLayer | LeftTensor, ...]
    inputs: GatheredInputs | None = None

    @property
    def layers(self) -> list[PlannedLayer]:
        return [entry for entry in self.entries if isinstance(entry, PlannedLayer)]


@dataclass(frozen=True)
class Plan:
    """All tasks of a run.

    ``trained_heads`` are the parameters that PEFT trains beside the adapter and keeps with it,
    ``evened`` the groups whose layers would have had different bits if servers did not hold each
    group as one, ``stacks`` the experts with adapters.
    """

    settings: Settings
    tasks: tuple[Task, ...]
    trained_heads: tuple[str, ...] = ()
    evened: tuple[tuple[str, ...], ...] = ()
    stacks: tuple[ExpertStack, ...] = ()

    @property
    def layers(self) -> list[PlannedLayer]:
        return [layer for task in self.tasks for layer in task.layers]

    @property
    def left(self) -> list[LeftTensor]:
        return [
            entry for task in self.tasks for entry in task.entries if isinstance(entry, LeftTensor)
        ]

    def in_order(self, modules: Sequence[str]) -> Plan:
        """The same, to be worked on in this order of modules.

        A layer that it does not name comes first of its block, and tensors to copy before all.
        """
        places = {module: place for place, module in enumerate(modules)}
        blocks: dict[str | None, int] = {}
        for module, place in places.items():
            blocks.setdefault(block_of(module), place)

        def when(entry: PlannedLayer | LeftTensor) -> tuple[int, bool]:
            if isinstance(entry, LeftTensor):
                return -1, False
            module = entry.layer.module
            if module in places:
                return places[module], True
            return blocks.get(block_of(module), -1), False

        entries = sorted((entry for task in self.tasks for entry in task.entries), key=when)
        return replace(self, tasks=tuple(_tasks(entries, self.settings)))

    def model_tensors(self, task: Task) -> list[PlannedTensor]:
        """What the task's output file will hold."""
        return [tensor for entry in task.entries for tensor in stored(entry, self.settings)]

    def adapter_tensors(self, layers: Iterable[PlannedLayer]) -> list[PlannedTensor]:
        """The A and B of these layers."""
        dtype = SHORT_NAMES[self.settings.adapter_dtype]
        return [
            tensor
            for planned in layers
            if planned.adapted
            for tensor in adapter.plan_lora(
                planned.layer.module, planned.shape, planned.stored_rank, dtype
            )
        ]

    @property
    def model_bytes(self) -> int:
        return sum(tensor.nbytes for task in self.tasks for tensor in self.model_tensors(task))

    @property
    def stack_tensors(self) -> list[PlannedTensor]:
        """The A and B of experts, by the names of files."""
        dtype = self.settings.adapter_dtype
        return [tensor for stack in self.stacks for tensor in stack.planned(stack.name, dtype)]

    @property
    def adapter_bytes(self) -> int:
        tensors = [*self.adapter_tensors(self.layers), *self.stack_tensors]
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def trainable_parameters(self) -> int:
        tensors = [*self.adapter_tensors(self.layers), *self.stack_tensors]
        return sum(math.prod(tensor.shape) for tensor in tensors)


def make_plan(inventory: Inventory, settings: Settings) -> Plan:
    """Decides for every tensor of the checkpoint what becomes of it.

    Bits and ranks that are to be measured first are those of the settings here (`allocation.py`
    replaces them).

    Raises:
        UnsupportedModel: no layer of this model can be quantized.
        UnknownTargetModule: a target matches no layer.
        InvalidSetting: the rank is too large for an adapted layer.
    """
    stacks = expert_stacks(inventory, settings)
    inventory = as_asked(inventory, settings)
    if not inventory.layers:
        reasons = sorted({left.reason for left in inventory.left if len(left.shape) == 2})
        raise UnsupportedModel(
            "no layer of this model can be quantized",
            cause="; ".join(reasons) or "it has no matrices",
            hint="PEFT alone can adapt it in 16 bits, from the original",
        )
    targets = [target for target in settings.target_modules if not is_of_experts(target)]
    adapted = match_targets(inventory, targets)
    together = {part.module for stack in stacks for parts in stack.experts for part in parts}

    def why_unadapted(layer: LinearLayer) -> str:
        if layer.module in together:
            return ADAPTED_TOGETHER
        return NOT_A_TARGET if layer.module not in adapted else inventory.why_unadapted(layer)

    entries = [
        _planned(entry, settings, why_unadapted(entry)) if isinstance(entry, LinearLayer) else entry
        for entry in inventory.entries
    ]
    layers = [entry for entry in entries if isinstance(entry, PlannedLayer)]
    for planned in layers:
        largest = min(planned.shape)
        if planned.rank > largest:
            raise InvalidSetting(
                f"rank {settings.rank} is too large for {planned.layer.module}",
                cause=f"the layer is {planned.shape[0]}×{planned.shape[1]}, "
                f"so its largest rank is {largest}",
                hint=f"--rank {largest}, or leave the layer out with --target-modules",
            )
    settings.container.require_fit([planned.weight for planned in layers])
    if settings.leading is not None:
        _require_others(inventory.layers, *settings.leading, settings.bits)
    return Plan(settings, tuple(_tasks(entries, settings)), stacks=stacks)


def as_asked(inventory: Inventory, settings: Settings) -> Inventory:
    """The same without experts among the layers where those are to stay as they are.

    Where they are not, stacks of them are layers too, a matrix each.
    """
    reason = settings.why_experts_stay
    kept = inventory if reason is None else inventory.keeping_experts(reason)
    return kept.apart(lambda stack: why_stacked(stack, settings))


def why_stacked(stack: Stack, settings: Settings) -> str | None:
    """Why experts that the model holds as one are not quantized; None: they are."""
    container = settings.container
    if settings.experts == "keep" or not container.quantizes:
        return settings.why_experts_stay
    if container.name in stack.patched:
        return None
    if stack.ruled:
        return settings.why_experts_stay
    if not container.restacks:
        return STACKED_EXPERTS
    return None if settings.experts == "quantize" else UNRULED_EXPERTS


def why_expert_stays(tensor: str, stacks: ModelStacks, settings: Settings) -> str | None:
    """The same of a matrix that has a tensor of its own."""
    if (held := stacks.restacked(tensor)) is None:
        return settings.why_experts_stay
    return why_stacked(held.place.stack, settings)


def skip_list(plan: Plan, architecture: Architecture) -> list[str]:
    """The modules that are not quantized, as the container's readers want them told."""
    skipped = architecture.skip_modules(
        planned.layer.module for planned in plan.layers if not planned.layer.expert
    )
    left = {each.tensor: each.reason for each in plan.left}
    more = more_skipped(plan.settings.container, plan.settings.experts, left)
    return sorted({*skipped, *more}) if more else skipped


def more_skipped(container: Container, experts: str | None, left: Mapping[str, str]) -> set[str]:
    """What is a layer only to readers that hold experts one by one: routers, and experts.

    Those are servers and transformers 4; ``left`` are the tensors that stay as they are, with the
    reasons.
    """
    if container.why_experts_stay is not None and experts != "quantize":
        return set()
    modules = {tensor.removesuffix(".weight"): reason for tensor, reason in left.items()}
    routers = {module for module, reason in modules.items() if reason == ROUTER}
    stacks = {stack for module in modules if (stack := expert_stack(module)) is not None}
    return {*routers, *map(container.skipped_stack, stacks)}


def _planned(layer: LinearLayer, settings: Settings, reason: str) -> PlannedLayer:
    """With an adapter, unless there is a ``reason`` against it."""
    bits = _bits_of(layer.module, settings)
    return PlannedLayer(layer, bits, 0 if reason else settings.rank, reason=reason)


def block_number(module: str) -> int | None:
    """Which of its stack's decoder blocks a module is in; None outside of them."""
    block = block_of(module)
    return None if block is None else int(block.rpartition(".")[2])


def _bits_of(module: str, settings: Settings) -> int:
    if settings.leading is None:
        return settings.bits
    blocks, bits = settings.leading
    number = block_number(module)
    return bits if number is not None and number < blocks else settings.bits


def _require_others(layers: Sequence[LinearLayer], blocks: int, bits: int, others: int) -> None:
    """Refuses so many first blocks that none, or nothing but them, would be left."""
    numbers = {block_number(layer.module) for layer in layers} - {None}
    if bits == others or not 0 < blocks < len(numbers):
        most = f"{bits}x{len(numbers) - 1},{others}"
        raise InvalidSetting(
            f"--bits {bits}x{blocks},{others} makes no difference between the layers",
            cause=f"the model has {len(numbers)} blocks",
            hint=f"--bits {most}" if bits != others and len(numbers) > 1 else f"--bits {bits}",
        )


def match_targets(inventory: Inventory, targets: Sequence[str]) -> set[str]:
    """The modules to adapt, by PEFT's rule: a target is a whole path or the end of one.

    Names as the checkpoint spells them are understood too, where the model class renames them.
    """
    modules = {layer.module for layer in inventory.layers}
    if tuple(targets) == (ALL_LINEAR,):
        return modules
    chosen: set[str] = set()
    for target in targets:
        hits = {
            layer.module
            for layer in inventory.layers
            if _ends_with(layer.module, target)
            or _ends_with(layer.tensor.removesuffix(".weight"), target)
        }
        if not hits:
            raise _unknown_target(target, inventory)
        chosen |= hits
    return chosen


def stored(entry: PlannedLayer | LeftTensor, settings: Settings) -> list[PlannedTensor]:
    """The tensors that an entry becomes in the output."""
    if isinstance(entry, LeftTensor):
        return [PlannedTensor(entry.tensor, entry.dtype, entry.shape)]
    return settings.container.planned(entry.weight)


def _tasks(entries: Sequence[PlannedLayer | LeftTensor], settings: Settings) -> Iterable[Task]:
    groups = shards(entries, lambda entry: sum(tensor.nbytes for tensor in stored(entry, settings)))
    if len(groups) == 1:
        return [Task("model.safetensors", tuple(groups[0]))]
    return [
        Task(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _unknown_target(target: str, inventory: Inventory) -> UnknownTargetModule:
    for left in inventory.left:
        if _ends_with(left.tensor.removesuffix(".weight"), target):
            return UnknownTargetModule(
                f"'{target}' is not a layer that can be adapted",
                cause=f"{left.tensor} stays as it is: {left.reason}",
                hint=f"--target-modules {ALL_LINEAR}",
            )
    names = sorted({last_part(layer.module) for layer in inventory.layers})
    near = difflib.get_close_matches(target, names, n=3, cutoff=0.4) or names
    return UnknownTargetModule(
        f"no layer is called '{target}'",
        cause=f"the linear layers of this model are {', '.join(names)}",
        hint=f"--target-modules {','.join(near)}",
    )
