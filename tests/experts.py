"""Small random mixtures of experts, and what their files hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file

from tests.zoo import ZOO

# One whose experts have names of their own, with shared experts, with dense layers before them.
NAMES = ["Mixtral", "Qwen2-MoE", "Qwen3-MoE", "DeepSeek-V3"]
BITS, BLOCK_SIZE = 4, 64
# By block, stack, expert and part of its rows.
Place: TypeAlias = tuple[str, str, int, int]
_MATRIX = re.compile(r".+\.(layers\.\d+)\..+\.experts\.(\d+)\.([^.]+)")
# The stack that each matrix becomes a part of, and which part of its rows.
_PLACES = {
    **dict.fromkeys(("gate_proj", "w1"), ("gate_up_proj", 0)),
    **dict.fromkeys(("up_proj", "w3"), ("gate_up_proj", 1)),
    **dict.fromkeys(("down_proj", "w2"), ("down_proj", 0)),
}


def save(name: str, directory: Path, **config: Any) -> Any:
    """A model of the zoo, whose experts are wide enough for whole blocks."""
    entry = ZOO[name]
    wide = {"moe_intermediate_size": 64} if name != "Mixtral" else {}
    model = replace(entry, config={**entry.config, **wide, **config}).build()
    model.save_pretrained(directory)
    return model.eval()


def unpacked(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """Q of 4 bits, by compressed-tensors' format as it is described: low bits first, less 8."""
    words = tensors[f"{module}.weight_packed"].to(torch.int64) & 0xFFFFFFFF
    codes = torch.stack([(words >> shift) & 15 for shift in range(0, 32, 4)], dim=-1)
    scale = tensors[f"{module}.weight_scale"].float().repeat_interleave(BLOCK_SIZE, dim=1)
    return (codes.flatten(1) - 8) * scale


def matrices_in(tensors: Iterable[str], end: str) -> Iterator[tuple[Place, str]]:
    """The experts that have a tensor with this end, each with its place in a loaded model."""
    for name in tensors:
        match = _MATRIX.fullmatch(name.removesuffix(end)) if name.endswith(end) else None
        if match is not None:
            layer, number, kind = match.groups()
            stack, part = _PLACES[kind]
            yield (layer, stack, int(number), part), name.removesuffix(end)


def experts_in(directory: Path) -> dict[Place, torch.Tensor]:
    """Q of every expert in a directory of compressed-tensors."""
    tensors = load_file(directory / "model.safetensors")
    return {
        place: unpacked(tensors, module) for place, module in matrices_in(tensors, ".weight_packed")
    }


def experts_of(model: Any) -> dict[Place, torch.Tensor]:
    """The same of a model that transformers holds, whose stacks have gate above up."""
    found = {}
    for name, module in model.named_modules():
        if not name.endswith(".experts"):
            continue
        layer = re.search(r"layers\.\d+", name)
        assert layer is not None
        for kind, parts in (("gate_up_proj", 2), ("down_proj", 1)):
            for number, matrix in enumerate(getattr(module, kind).detach()):
                for part, rows in enumerate(matrix.chunk(parts)):
                    found[layer[0], kind, number, part] = rows
    return found


def same_experts(model: Any, directory: Path) -> int:
    """How many matrices of experts there are, once each has been seen to be Q to the bit."""
    stored, held = experts_in(directory), experts_of(model)
    assert stored.keys() == held.keys()
    for place, Q in stored.items():
        assert torch.equal(held[place], Q), place
    return len(stored)


def tokens() -> torch.Tensor:
    return torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(3))


def takes_a_step(model: Any) -> None:
    """Forward passes repeat to the bit, and one step on the adapter alone lowers the loss."""
    given = {"input_ids": tokens(), "labels": tokens()}
    with torch.no_grad():
        first, second = model(**given), model(**given)
    assert torch.equal(first.logits, second.logits)
    trained = [each for name, each in model.named_parameters() if ".lora_" in name]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is each for each in trained))
    optimizer = torch.optim.SGD(trained, lr=0.01)
    model(**given).loss.backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in trained)
    optimizer.step()
    with torch.no_grad():
        assert model(**given).loss < first.loss


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
