"""Layers that servers hold as one, and read with one width: by the names that vLLM's classes put
together (`packed_modules_mapping` of its models).
"""

from __future__ import annotations

from collections.abc import Iterable

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


def fused_name(module: str) -> str | None:
    """The module that this one becomes a part of; None where it stays one of its own."""
    path, dot, last = module.rpartition(".")
    return f"{path}{dot}{_FUSED[last]}" if last in _FUSED else None


def fused_groups(modules: Iterable[str]) -> list[list[str]]:
    """The modules, those together that become one."""
    groups: dict[str, list[str]] = {}
    for module in modules:
        groups.setdefault(fused_name(module) or module, []).append(module)
    return list(groups.values())
