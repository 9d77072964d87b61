"""Experts that get adapters: which a user means, and what A and B of all of them are to PEFT.

transformers 5 holds the matrices of a block's experts as parameters (experts, out, in), gate and up
below each other in one of them. PEFT adapts such a parameter by `target_parameters`: A (r·E, in)
and B (out, r·E) for E experts, whose own are A.view(E, r, in)[e] and B.view(out, r, E)[..., e]
(read in peft 0.21.2, `ParamWrapper.get_delta_weight`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loftq_cli.checkpoint.writer import PlannedTensor
from loftq_cli.containers.fused import stack_part
from loftq_cli.engines.settings import Settings
from loftq_cli.errors import InvalidSetting, UnknownTargetModule, UsageError
from loftq_cli.formats import ALL_EXPERTS, ALL_LINEAR, SHORT_NAMES
from loftq_cli.models.layers import STACKED_EXPERTS, Inventory, LinearLayer

_PARAMETER = re.compile(r"(.+\.)?experts\.[^.\d][^.]*")


@dataclass(frozen=True)
class ExpertStack:
    """A parameter of all experts of a block, with an adapter of rank ``rank`` for each of them.

    ``experts`` has the matrices of each, from above. Without ``quantized`` they are stored as they
    were.
    """

    name: str  # as the files spell the path
    experts: tuple[tuple[LinearLayer, ...], ...]
    rank: int
    quantized: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of one expert."""
        parts = self.experts[0]
        return sum(part.out_features for part in parts), parts[0].in_features

    @property
    def layers(self) -> list[LinearLayer]:
        """As many layers as there are experts, for what is counted by layers."""
        out_features, in_features = self.shape
        return [
            replace(parts[0], out_features=out_features, in_features=in_features)
            for parts in self.experts
        ]

    def planned(self, module: str, dtype: str) -> list[PlannedTensor]:
        """A and B in the adapter's file, where PEFT has them at ``module``."""
        ranks, (out_features, in_features) = self.rank * len(self.experts), self.shape
        kind = SHORT_NAMES[dtype]
        return [
            PlannedTensor(f"{module}.lora_A.weight", kind, (ranks, in_features)),
            PlannedTensor(f"{module}.lora_B.weight", kind, (out_features, ranks)),
        ]


def is_of_experts(target: str) -> bool:
    """Whether it names parameters of experts: `experts` all of them, `experts.down_proj` one."""
    return target == ALL_EXPERTS or _PARAMETER.fullmatch(target) is not None


def expert_stacks(inventory: Inventory, settings: Settings) -> tuple[ExpertStack, ...]:
    """The stacks that --target-modules names, of a model's layers before any is kept as it is.

    Raises:
        UnknownTargetModule: a name fits no stack.
        InvalidSetting: what loads the container takes no adapter there, or none of this rank.
        UsageError: it contradicts another option.
    """
    targets = [target for target in settings.target_modules if is_of_experts(target)]
    if not targets:
        return ()
    if len(targets) == len(settings.target_modules):
        raise UsageError(
            "experts get adapters beside other layers, not alone",
            hint=f"--target-modules {ALL_LINEAR},{','.join(targets)}",
        )
    if settings.rank_budget:
        raise UsageError("--rank-budget gives experts no ranks: not with adapters on experts")
    quantized = settings.container.quantizes and settings.why_experts_stay is None
    if quantized and settings.container.stays_packed:
        raise InvalidSetting(
            f"no adapters on quantized experts in {settings.container_name}",
            cause="they stay packed in memory, where PEFT (0.21.2) adds such an adapter once more "
            "in every forward pass",
            hint="--experts keep, or --container compressed-tensors",
        )
    found = _stacks(inventory)
    chosen: dict[str, None] = {}
    for target in targets:
        end = f".{target}"
        hits = [name for name in found if target == ALL_EXPERTS or f".{name}".endswith(end)]
        if not hits:
            raise _unknown(target, list(found))
        chosen.update(dict.fromkeys(hits))
    stacks = tuple(
        ExpertStack(name, found[name], settings.rank, quantized) for name in found if name in chosen
    )
    for stack in stacks:
        if stack.rank > min(stack.shape):
            raise InvalidSetting(
                f"rank {stack.rank} is too large for an expert of {stack.name}",
                cause=f"it is {stack.shape[0]}×{stack.shape[1]}",
                hint=f"--rank {min(stack.shape)}",
            )
    return stacks


def _stacks(inventory: Inventory) -> dict[str, tuple[tuple[LinearLayer, ...], ...]]:
    """By stack, its experts' matrices; only such stacks as are whole."""
    places: dict[str, dict[tuple[int, int], LinearLayer]] = {}
    apart = inventory.apart(lambda stack: None if stack.ruled else STACKED_EXPERTS)
    for layer in apart.layers:
        part = stack_part(layer.module) if layer.expert else None
        if part is not None:
            places.setdefault(part.stack, {})[part.expert, part.part] = layer
    found = {}
    for name, matrices in places.items():
        experts, parts = (1 + max(place[axis] for place in matrices) for axis in (0, 1))
        if len(matrices) == experts * parts:
            found[name] = tuple(
                tuple(matrices[expert, part] for part in range(parts)) for expert in range(experts)
            )
    return found


def _unknown(target: str, names: Sequence[str]) -> UnknownTargetModule:
    ends = sorted({name.rpartition(".")[2] for name in names})
    return UnknownTargetModule(
        f"no experts are called '{target}'",
        cause=f"those that can have adapters are experts.{' and experts.'.join(ends)}"
        if ends
        else "adapters are for experts that a model holds as stacks of gate, up and down, and it "
        "has none that loftq knows as such",
        hint=f"--target-modules {ALL_LINEAR}" + (f",{ALL_EXPERTS}" if ends else ""),
    )
