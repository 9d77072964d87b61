"""The plan of a `quantize` run: pure data, made from headers and config alone.

A plan says which tensor goes into which output file, and in what form. Each output file is one
task: it depends on its input tensors and on nothing else, so tasks can run in any order, in one
process or many, and again after a crash.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from loftq_cli.checkpoint import adapter
from loftq_cli.checkpoint.writer import PlannedTensor
from loftq_cli.containers import bitsandbytes4 as container
from loftq_cli.errors import InvalidSetting, UnknownTargetModule, UnsupportedModel, UsageError
from loftq_cli.models.layers import Inventory, LeftTensor, LinearLayer, last_part
from loftq_cli.starts import STARTS, Start

# One output file is the unit of work that a killed run may lose.
SHARD_BYTES = 1 << 30
ALL_LINEAR = "all-linear"
# Beyond these, float32 adapters lose the correction; nobody trains there.
SCALINGS = (1e-6, 1e6)
# The largest rank of a layer with --rank-budget, as a multiple of the one asked for: so many
# directions of every residual are looked at. No layer of the demo would take more.
MOST_RANKS = 4
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class CalibrationText:
    """The text that the moments come from, told apart from others by its content."""

    sha256: str
    tokens: int  # at most so many of it


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the result. The same settings give the same bytes.

    ``bits`` is what a weight's code tells: 2 and 3 live in the 4-bit container, as fewer of its
    levels; 16 leaves the weights as they are. ``leading`` (blocks, bits) says it for the first
    blocks of the model, ``target_bits`` for the average of all layers, which get 2, 3 or 4 by what
    each loses. With ``rank_budget`` the ranks differ too, with as many parameters in all as
    ``rank`` everywhere would have; ``uniform_rank`` then pads them to the largest.
    """

    bits: Literal[2, 3, 4, 8, 16] = 4
    leading: tuple[int, int] | None = None
    target_bits: float | None = None
    quant_type: Literal["nf4", "fp4"] = "nf4"
    block_size: int = 64
    double_quant: bool = False
    init: str = "loftq"  # a name in `starts.STARTS`
    rank: int = 16
    rank_budget: bool = False
    uniform_rank: bool = False
    iterations: int | None = None  # None: until another one hardly pays
    lora_alpha: float = 16
    use_rslora: bool = False
    svd: Literal["auto", "exact", "randomized"] = "auto"
    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    calibration: CalibrationText | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise UsageError(
                f"no block size {self.block_size}",
                cause="bitsandbytes has kernels for powers of two from 32 to 4096",
                hint="--block-size 64",
            )
        for name, value in (("rank", self.rank), ("iterations", self.iterations)):
            if value is not None and value < 1:
                raise UsageError(f"{name} {value} is too small", hint=f"--{name} 1")
        low, high = SCALINGS
        if not (math.isfinite(self.lora_alpha) and low <= self.scaling <= high):
            raise UsageError(
                f"lora_alpha {self.lora_alpha:g} is out of range",
                cause=f"it must leave a LoRA scaling between {low:g} and {high:g}: "
                "the correction is divided by it",
                hint=f"--lora-alpha {self.rank}",
            )

    @property
    def start(self) -> Start:
        return STARTS[self.init]

    @property
    def scaling(self) -> float:
        """s in W ≈ Q + s·B·A."""
        return self.lora_alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    def alpha_of(self, rank: int) -> float:
        """The lora_alpha that gives a layer of this rank the scaling that all have."""
        if rank == self.rank:
            return self.lora_alpha
        return self.scaling * (rank**0.5 if self.use_rslora else rank)

    @property
    def container_bits(self) -> Literal[4, 8, 16]:
        """Bits of a weight in the file: the container has no smaller codes than 4 bits."""
        return 4 if self.bits < 4 else self.bits  # type: ignore[return-value]

    @property
    def is_measured(self) -> bool:
        """Whether bits or ranks follow from what the layers lose, which has to be seen first."""
        return self.target_bits is not None or self.rank_budget

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "target_modules": list(self.target_modules)}


@dataclass(frozen=True)
class PlannedLayer:
    """A linear layer in ``bits`` bits, with an adapter of rank ``rank`` or, at 0, without one."""

    layer: LinearLayer
    bits: int
    rank: int
    padding: int = 0  # rows of A and columns of B beside those that are computed

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
    def source_shape(self) -> tuple[int, int]:
        """As the checkpoint has it."""
        return self.shape[::-1] if self.layer.transposed else self.shape


@dataclass(frozen=True)
class Task:
    """One output file: layers to quantize and tensors to copy, in the checkpoint's order."""

    file_name: str
    entries: tuple[PlannedLayer | LeftTensor, ...]

    @property
    def layers(self) -> list[PlannedLayer]:
        return [entry for entry in self.entries if isinstance(entry, PlannedLayer)]


@dataclass(frozen=True)
class Plan:
    """All tasks of a run."""

    settings: Settings
    tasks: tuple[Task, ...]

    @property
    def layers(self) -> list[PlannedLayer]:
        return [layer for task in self.tasks for layer in task.layers]

    @property
    def left(self) -> list[LeftTensor]:
        return [
            entry for task in self.tasks for entry in task.entries if isinstance(entry, LeftTensor)
        ]

    def in_order(self, modules: Sequence[str]) -> Plan:
        """The same, to be worked on in this order of modules; what is only copied comes first."""
        places = {module: place for place, module in enumerate(modules)}
        entries = [entry for task in self.tasks for entry in task.entries]
        entries.sort(
            key=lambda entry: places[entry.layer.module] if isinstance(entry, PlannedLayer) else -1
        )
        return Plan(self.settings, tuple(_tasks(entries, self.settings)))

    def model_tensors(self, task: Task) -> list[PlannedTensor]:
        """What the task's output file will hold."""
        return [tensor for entry in task.entries for tensor in stored(entry, self.settings)]

    def adapter_tensors(self, layers: Iterable[PlannedLayer]) -> list[PlannedTensor]:
        """The A and B of these layers."""
        return [
            tensor
            for planned in layers
            if planned.adapted
            for tensor in adapter.plan_lora(
                planned.layer.module, planned.shape, planned.stored_rank
            )
        ]

    @property
    def model_bytes(self) -> int:
        return sum(tensor.nbytes for task in self.tasks for tensor in self.model_tensors(task))

    @property
    def adapter_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.adapter_tensors(self.layers))

    @property
    def trainable_parameters(self) -> int:
        return self.adapter_bytes // 4


def make_plan(inventory: Inventory, settings: Settings) -> Plan:
    """Decides for every tensor of the checkpoint what becomes of it.

    Bits and ranks that are to be measured first are those of the settings here (`allocation.py`
    replaces them).

    Raises:
        UnsupportedModel: no layer of this model can be quantized.
        UnknownTargetModule: a target matches no layer.
        InvalidSetting: the rank is too large for an adapted layer.
    """
    if not inventory.layers:
        reasons = sorted({left.reason for left in inventory.left if len(left.shape) == 2})
        raise UnsupportedModel(
            "no layer of this model can be quantized",
            cause="; ".join(reasons) or "it has no matrices",
        )
    adapted = match_targets(inventory, settings.target_modules)
    entries = [
        PlannedLayer(
            entry,
            _bits_of(entry.module, settings),
            settings.rank if entry.module in adapted else 0,
        )
        if isinstance(entry, LinearLayer)
        else entry
        for entry in inventory.entries
    ]
    for planned in (entry for entry in entries if isinstance(entry, PlannedLayer)):
        largest = min(planned.shape)
        if planned.rank > largest:
            raise InvalidSetting(
                f"rank {settings.rank} is too large for {planned.layer.module}",
                cause=f"the layer is {planned.shape[0]}×{planned.shape[1]}, "
                f"so its largest rank is {largest}",
                hint=f"--rank {largest}, or leave the layer out with --target-modules",
            )
    if settings.container_bits == 4:
        _require_whole_blocks(inventory.layers, settings.block_size)
    if settings.leading is not None:
        _require_others(inventory.layers, *settings.leading, settings.bits)
    return Plan(settings, tuple(_tasks(entries, settings)))


def block_number(module: str) -> int | None:
    """Which of its stack's blocks a module is in: the first number in its path."""
    return next((int(part) for part in module.split(".") if part.isdecimal()), None)


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
            hint=f"--bits {most}" if len(numbers) > 1 else f"--bits {bits}",
        )


def _require_whole_blocks(layers: Sequence[LinearLayer], block_size: int) -> None:
    """Refuses a block size that some layer's rows are no multiple of."""
    misfit = next((layer for layer in layers if not layer.fits(block_size)), None)
    if misfit is not None:
        fitting = [size for size in BLOCK_SIZES if all(layer.fits(size) for layer in layers)]
        raise InvalidSetting(
            f"block size {block_size} does not fit {misfit.module}",
            cause=f"its rows have {misfit.in_features} weights, and bitsandbytes' kernels "
            "want whole blocks in a row",
            hint=f"--block-size {max(fitting)}",
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
    if settings.container_bits == 16:
        return [PlannedTensor(entry.layer.tensor, entry.layer.dtype, entry.source_shape)]
    if settings.container_bits == 8:
        return container.plan_8bit(entry.layer.tensor, entry.shape)
    return container.plan_4bit(
        entry.layer.tensor,
        entry.shape,
        entry.layer.dtype,
        settings.quant_type,
        settings.block_size,
        settings.double_quant,
    )


def _tasks(entries: Sequence[PlannedLayer | LeftTensor], settings: Settings) -> Iterable[Task]:
    groups: list[list[PlannedLayer | LeftTensor]] = [[]]
    filled = 0
    for entry in entries:
        size = sum(tensor.nbytes for tensor in stored(entry, settings))
        if groups[-1] and filled + size > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += size
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
