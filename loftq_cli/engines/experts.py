"""What a plan makes of the matrices of experts: how many there are, and how large."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from loftq_cli.checkpoint.index import Checkpoint
from loftq_cli.containers.fused import expert_stack
from loftq_cli.engines.expert_stacks import ExpertStack
from loftq_cli.engines.plan import Plan, PlannedLayer, stored
from loftq_cli.engines.settings import Settings
from loftq_cli.formats import DTYPE_BITS
from loftq_cli.models.layers import LeftTensor
from loftq_cli.record import Record
from loftq_cli.report.experts import told
from loftq_cli.schema import ExpertAdapters, Experts, ExpertShape


def experts_of(
    entries: Iterable[PlannedLayer | LeftTensor], settings: Settings, parameters: int
) -> Experts | None:
    """The experts among the tensors of a model of so many ``parameters``; None: it has none.

    Biases and scales are no matrices.
    """
    shapes: Counter[tuple[int, int]] = Counter()
    reasons: Counter[str] = Counter()
    quantized = before = after = 0
    loader: Literal["transformers", "loftq"] | None = None
    for entry in entries:
        if not _is_expert(entry):
            continue
        matrices = _matrices(entry)
        shapes.update(matrices)
        count = len(matrices)
        nbytes = _nbytes(entry)
        before += nbytes
        if isinstance(entry, PlannedLayer) and settings.container.quantizes:
            quantized += count
            after += sum(tensor.nbytes for tensor in stored(entry, settings))
            if (place := entry.layer.place) is not None and not place.stack.ruled:
                by_class = settings.container.name in place.stack.patched
                loader = "transformers" if by_class else "loftq"
        else:
            after += nbytes
            reasons[entry.reason] += nbytes
    if not shapes:
        return None
    held = sum(count * rows * columns for (rows, columns), count in shapes.items())
    return Experts(
        matrices=sum(shapes.values()),
        quantized=quantized,
        shapes=[
            ExpertShape(out_features=rows, in_features=columns, count=count)
            for (rows, columns), count in shapes.items()
        ],
        parameters=held,
        share_of_parameters=held / max(parameters, 1),
        input_bytes=before,
        output_bytes=after,
        reason=max(reasons, key=lambda reason: reasons[reason]) if reasons else None,
        loader=loader,
    )


def expert_adapters(
    stacks: Sequence[ExpertStack],
    settings: Settings,
    target_parameters: Sequence[str],
    errors: Sequence[float] | None,
) -> ExpertAdapters | None:
    """The adapters of experts; None: there are none.

    Without ``target_parameters`` it is told by the names of files how PEFT finds them.
    """
    if not stacks:
        return None
    tensors = [each for stack in stacks for each in stack.planned("", settings.adapter_dtype)]
    before, after = errors or (None, None)
    return ExpertAdapters(
        target_parameters=list(target_parameters)
        or sorted({".".join(stack.name.split(".")[-2:]) for stack in stacks}),
        experts=sum(len(stack.experts) for stack in stacks),
        rank=settings.rank,
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        backbone_error_relative=before,
        weight_error_relative=after,
    )


def has_experts(plan: Plan) -> bool:
    """Whether there are matrices of experts among its tensors, quantized or not."""
    return any(_is_expert(entry) for task in plan.tasks for entry in task.entries)


def tell_of_experts(plan: Plan, checkpoint: Checkpoint, record: Record) -> None:
    """Where most of the bytes stay as they were, that is said before hours are spent."""
    entries = (entry for task in plan.tasks for entry in task.entries)
    parameters = sum(info.elements for info in checkpoint.infos)
    experts = experts_of(entries, plan.settings, parameters)
    if experts is None or not plan.settings.container.quantizes:
        return
    if experts.reason is not None:
        record.warn(f"experts: {told(experts)}")
    if experts.loader == "loftq":
        record.warn(
            "transformers does not load this model's experts quantized: they are for loftq, and "
            "for servers that read them one by one"
        )


def _is_expert(entry: PlannedLayer | LeftTensor) -> bool:
    if isinstance(entry, PlannedLayer):
        return entry.layer.expert
    if entry.stack is not None:
        return True
    module = entry.tensor.removesuffix(".weight")
    if expert_stack(module) is None:
        return False
    return len(entry.shape) == 3 or (len(entry.shape) == 2 and module != entry.tensor)


def _matrices(entry: PlannedLayer | LeftTensor) -> list[tuple[int, int]]:
    """(out, in) of each; of a stack that nobody takes apart, the two last sides as they lie."""
    if isinstance(entry, LeftTensor) and (layers := list(entry.layers())):
        return [(layer.out_features, layer.in_features) for layer in layers]
    shape = entry.shape
    return [(shape[-2], shape[-1])] * math.prod(shape[:-2])


def _nbytes(entry: PlannedLayer | LeftTensor) -> int:
    """Of the source's tensor, as it is read."""
    dtype = entry.layer.dtype if isinstance(entry, PlannedLayer) else entry.dtype
    return math.prod(entry.shape) * DTYPE_BITS[dtype] // 8
