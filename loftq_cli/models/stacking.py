"""Matrices that lie in files one an expert, and that a model holds as one stack."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loftq_cli.containers.fused import expert_stack

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.core_model_loading import WeightConverter


def stacked_shape(
    tensor: str, stack: Tensor | None, rule: WeightConverter
) -> tuple[int, int] | None:
    """(out, in) of an expert's matrix that ``rule`` makes a part of ``stack``; None: it is none.

    It is one if transformers does no more with it than to stack it, with those of the other
    experts, and to put the stacks of gate and up one below the other.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist

    if stack is None or stack.ndim != 3 or not tensor.endswith(".weight"):
        return None
    if expert_stack(tensor.removesuffix(".weight")) is None:
        return None
    parts = len(rule.source_patterns)
    steps = [(type(step), getattr(step, "dim", None)) for step in rule.operations]
    below = [(Concatenate, 1)] if parts > 1 else []
    if steps != [(MergeModulelist, 0), *below]:
        return None
    _, rows, columns = stack.shape
    return rows // parts, columns
