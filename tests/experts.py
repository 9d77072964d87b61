"""Small random mixtures of experts, and what their files hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pytest
import torch
from safetensors.torch import load_file, save_file

from loftq_cli import api
from loftq_cli.schema import QuantizeResults
from tests.zoo import ZOO
from tests.zoo.making import decoder

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


def build(name: str, **config: Any) -> Any:
    """A model of the zoo, whose experts are wide enough for whole blocks."""
    entry = ZOO[name]
    wide = {"moe_intermediate_size": 64} if name != "Mixtral" else {}
    return replace(entry, config={**entry.config, **wide, **config}).build().eval()


def save(name: str, directory: Path, **config: Any) -> Any:
    model = build(name, **config)
    model.save_pretrained(directory)
    return model


class Made(NamedTuple):
    """What `quantize` made of a model, by directories."""

    source: Path
    out: Path
    original: Any
    results: QuantizeResults


def made_once(
    folders: pytest.TempPathFactory,
    save: Callable[[str, Path], Any],
    settings: Callable[[str], dict[str, Any]],
) -> Callable[[str], Made]:
    """Models by name, each saved and quantized in compressed-tensors when it is first asked for."""

    @cache
    def make(name: str) -> Made:
        directory = folders.mktemp("experts")
        source, out = directory / "source", directory / "out"
        original = save(name, source)
        asked = {"container": "compressed-tensors", **settings(name)}
        return Made(source, out, original, api.quantize(str(source), output=out, **asked).results)

    return make


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


WIDE = {"moe_intermediate_size": 64}
# Where experts lie in each, what halves of a stack are called, and whether it has (in, out).
GATED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
WHOLE = {"gate_up_proj": ("gate_up_proj",), "down_proj": ("down_proj",)}
MIXTRAL = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
GEMMA_4 = decoder(
    "Gemma4",
    "Gemma4Text",
    **WIDE,
    enable_moe_block=True,
    num_experts=4,
    top_k_experts=4,
    head_dim=16,
    global_head_dim=16,
    hidden_size_per_layer_input=0,
    num_kv_shared_layers=0,
    layer_types=["sliding_attention", "full_attention"],
)


class Kind(NamedTuple):
    entry: Any
    parts: dict[str, tuple[str, ...]]
    transposed: bool
    asked: tuple[str, ...]  # to quantize them


ASK = ("--experts", "quantize")
KINDS = {
    "gpt-oss": Kind(ZOO["gpt-oss"], WHOLE, True, ASK),
    "Llama 4": Kind(ZOO["Llama 4"], GATED, True, ()),
    "Gemma 4": Kind(GEMMA_4, GATED, False, ASK),
    "Granite-MoE": Kind(ZOO["Granite-MoE"], GATED, False, ASK),
    "Qwen3.5-MoE": Kind(ZOO["Qwen3.5-MoE"], GATED, False, ()),
    "Mixtral": Kind(ZOO["Mixtral"], MIXTRAL, False, ()),
}


def save_stacked(
    name: str, directory: Path, dtype: torch.dtype = torch.float32, **config: Any
) -> Any:
    """A small random model whose file has the experts as its class has them.

    Every token goes to all of them: rounding sends none elsewhere.
    """
    entry = KINDS[name].entry
    wide = {**(WIDE if "moe_intermediate_size" in entry.config else {}), "num_experts_per_tok": 4}
    model = replace(entry, config={**entry.config, **wide, **config}).build(dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # biases of experts begin at anything
            if parameter.ndim == 2 or parameter.ndim == 3:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(directory)
    state = {key: each.contiguous() for key, each in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return model.eval()


def stacks_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: each for name, each in state.items() if each.ndim == 3 and ".experts." in name}


def expected(name: str, tensors: dict[str, torch.Tensor], stack: str, expert: int) -> torch.Tensor:
    """An expert's part of a stack of the class, put together from the codes of a directory."""
    path, _, last = stack.rpartition(".")
    parts = [unpacked(tensors, f"{path}.{expert}.{part}") for part in KINDS[name].parts[last]]
    matrix = torch.cat(parts)
    return matrix.T if KINDS[name].transposed else matrix
