"""The starts of experts' adapters, in PEFT's layout, once all codes are written.

An expert's codes are those that it has without an adapter. Its start is the best of its rank for
what they leave of all matrices that the model holds as one: gate and up are taken together. One
expert is in memory at a time, and the A and B of one stack.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from loftq_cli.checkpoint.index import Checkpoint
from loftq_cli.checkpoint.safetensors import read_header
from loftq_cli.checkpoint.staging import Staging
from loftq_cli.checkpoint.tensors import tensor_memory
from loftq_cli.checkpoint.writer import PlannedTensor
from loftq_cli.containers.base import Tensors, Weight
from loftq_cli.engines.expert_stacks import ExpertStack
from loftq_cli.engines.placement import read_weight
from loftq_cli.engines.plan import Plan
from loftq_cli.engines.tasks import layer_seed
from loftq_cli.errors import LoftqError, UnsupportedModel
from loftq_cli.models.expert_parameters import adapter_modules, is_targeted
from loftq_cli.models.layers import LinearLayer
from loftq_cli.record import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from loftq_cli.models.architecture import Architecture


class AdaptedStack(NamedTuple):
    """The parameter of the model class that a stack is, and where PEFT has its A and B."""

    stack: ExpertStack
    parameter: str
    module: str


def adapted_stacks(plan: Plan, architecture: Architecture) -> list[AdaptedStack]:
    """Where the plan's stacks are in the model.

    Raises:
        UnsupportedModel: the class makes something else of the matrices than a stack of them.
    """
    stacks = {_parameter(stack, architecture): stack for stack in plan.stacks}
    modules = adapter_modules(architecture.model, stacks)
    return [
        AdaptedStack(stack, parameter, modules[parameter]) for parameter, stack in stacks.items()
    ]


def target_parameters(plan: Plan, architecture: Architecture) -> list[str]:
    """What PEFT finds these parameters by, and no others: the ends of their names if those do."""
    adapted = {each.parameter for each in adapted_stacks(plan, architecture)}
    ends = {".".join(name.split(".")[-2:]) for name in adapted}
    others = {name for name, _ in architecture.model.named_parameters()} - adapted
    return sorted(adapted if any(is_targeted(name, [*ends]) for name in others) else ends)


def _parameter(stack: ExpertStack, architecture: Architecture) -> str:
    names = [part.tensor for parts in stack.experts for part in parts]
    found = set(architecture.parameters_of(names).values())
    parameter = found.pop()
    ruled = [architecture.stacks.ruled_place(name) for name in names]
    order = [None if place is None else place.part for place in ruled]
    expected = [number for parts in stack.experts for number in range(len(parts))]
    owner = architecture.model.get_submodule(parameter.rpartition(".")[0])
    shape = tuple(architecture.model.get_parameter(parameter).shape)
    as_stacked = shape == (len(stack.experts), *stack.shape)
    if found or order != expected or not as_stacked or getattr(owner, "is_transposed", False):
        raise UnsupportedModel(
            f"no adapters on {stack.name}",
            cause=f"{architecture.class_name} does more with its matrices than to stack them",
            hint="leave experts out of --target-modules",
        )
    return parameter


@dataclass
class ExpertStarts:
    """The starts of a plan's stacks, computed as :meth:`tensors` is iterated.

    ``energies`` are, of the stacks so far, ‖W‖², ‖W − Q‖² and ‖W − Q − s·B·A‖².
    """

    plan: Plan
    checkpoint: Checkpoint
    staging: Staging
    adapted: list[AdaptedStack]
    device: str
    progress: Progress
    energies: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])

    @property
    def planned(self) -> list[PlannedTensor]:
        dtype = self.plan.settings.adapter_dtype
        return [
            tensor for each in self.adapted for tensor in each.stack.planned(each.module, dtype)
        ]

    def tensors(self) -> Iterator[tuple[str, memoryview]]:
        """Names and bytes, in the order of ``planned``."""
        import torch

        dtype = getattr(torch, self.plan.settings.adapter_dtype)
        written: Tensors = {}
        if any(each.stack.quantized for each in self.adapted):
            headers = [read_header(self.staging.path(each.file_name)) for each in self.plan.tasks]
            written = {
                name: (header, info) for header in headers for name, info in header.tensors.items()
            }
        weights = {planned.tensor: planned.weight for planned in self.plan.layers}
        for stack, parameter, module in self.adapted:
            first, second = stack.planned(module, self.plan.settings.adapter_dtype)
            A = torch.empty(first.shape, dtype=dtype)
            B = torch.empty(second.shape, dtype=dtype)
            by_expert = B.view(len(B), stack.rank, len(stack.experts))
            for number, parts in enumerate(stack.experts):
                name = f"{parameter}.{number}"
                self.progress.start(name)
                try:
                    own_A, own_B = self._start(stack, parts, name, weights, written)
                except LoftqError as error:
                    raise error.within(parts[0].tensor) from error
                A[number * stack.rank : (number + 1) * stack.rank] = own_A
                by_expert[..., number] = own_B
                self.progress.advance(name)
            yield first.name, tensor_memory(A)
            yield second.name, tensor_memory(B)

    def relative_errors(self) -> tuple[float, float] | None:
        """‖W − Q‖ / ‖W‖ and ‖W − Q − s·B·A‖ / ‖W‖ over all stacks; None where none has codes."""
        whole, before, after = self.energies
        return (math.sqrt(before / whole), math.sqrt(after / whole)) if whole else None

    def _start(
        self,
        stack: ExpertStack,
        parts: tuple[LinearLayer, ...],
        name: str,
        weights: dict[str, Weight],
        written: Tensors,
    ) -> tuple[Tensor, Tensor]:
        import torch

        from loftq_cli.core.loftq import plain_adapter, start_of_residual
        from loftq_cli.core.residual import sum_of_squares

        settings = self.plan.settings
        seed = layer_seed(settings.seed, name)
        if not (stack.quantized and settings.start.corrects):
            return plain_adapter(stack.shape, stack.rank, seed)
        residuals = []
        for part in parts:
            W = read_weight(self.checkpoint, part, self.device)
            stored = settings.container.read(written, weights[part.tensor], str(W.device))
            residuals.append(W.float() - settings.container.runtime(stored).float())
            self.energies[0] += sum_of_squares(W)
        R = torch.cat(residuals)
        A, B, left = start_of_residual(
            R,
            stack.rank,
            scaling=settings.scaling,
            svd=settings.start.svd if settings.start.svd == "exact" else settings.svd,
            adapter_dtype=getattr(torch, settings.adapter_dtype),
            seed=seed,
        )
        self.energies[1] += sum_of_squares(R)
        self.energies[2] += left
        return A.cpu(), B.cpu()
