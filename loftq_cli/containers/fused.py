"""Layers that servers hold as one, and read with one width: by the names that vLLM's classes put
together (`packed_modules_mapping` of its models).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

# The last part of a module's name, and what takes its place.
_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("query", "key", "value"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
    **dict.fromkeys(("w1", "w3"), "gate_up_proj"),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj"),
    **dict.fromkeys(("in_proj_qkv", "in_proj_z"), "in_proj_qkvz"),
    **dict.fromkeys(("in_proj_b", "in_proj_a"), "in_proj_ba"),
}


# The parameter of transformers 5 that an expert's matrix is rows of, and which, from above.
_STACKED = {
    **dict.fromkeys(("gate_proj", "w1"), ("gate_up_proj", 0)),
    **dict.fromkeys(("up_proj", "w3"), ("gate_up_proj", 1)),
    **dict.fromkeys(("down_proj", "w2"), ("down_proj", 0)),
}


class StackPart(NamedTuple):
    """An expert's matrix, as a part of a stack of all experts."""

    stack: str
    expert: int
    part: int


# experts.N.NAME of such as are apart, experts.NAME of such as are stacked.
_EXPERT = re.compile(r"(.+\.experts)\.(?:(\d+)\.)?[^.]+")


def expert_stack(module: str) -> str | None:
    """The module that holds this matrix of an expert with those of all; None: it is no expert's."""
    found = _EXPERT.fullmatch(module)
    return None if found is None else found[1]


def expert_number(module: str) -> int | None:
    """Which of its block's experts a matrix is of; None where it is none's, or that of all."""
    found = _EXPERT.fullmatch(module)
    return None if found is None or found[2] is None else int(found[2])


def stack_part(module: str) -> StackPart | None:
    """Where transformers 5 puts an expert's matrix, by its name; None where that is not known."""
    path, number = expert_stack(module), expert_number(module)
    found = _STACKED.get(module.rpartition(".")[2])
    if path is None or number is None or found is None:
        return None
    name, part = found
    return StackPart(f"{path}.{name}", number, part)


def expert_pattern(stack: str) -> str:
    """What compressed-tensors and vLLM know the matrices of all experts of a block by.

    vLLM 0.33 asks for `stack.0.gate_proj`, whatever the matrices are called.
    """
    return f"re:{re.escape(stack)}\\.\\d+\\..*"


def fused_name(module: str) -> str | None:
    """The module that this one becomes a part of; None where it stays one of its own."""
    if (stack := expert_stack(module)) is not None:
        return stack
    path, dot, last = module.rpartition(".")
    return f"{path}{dot}{_FUSED[last]}" if last in _FUSED else None


def fused_groups(modules: Iterable[str]) -> list[list[str]]:
    """The modules, those together that become one."""
    groups: dict[str, list[str]] = {}
    for module in modules:
        groups.setdefault(fused_name(module) or module, []).append(module)
    return list(groups.values())
