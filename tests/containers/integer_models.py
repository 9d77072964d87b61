"""A small Llama in an integer container, written by hand: no plan, no start, no adapter."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loftq_cli.checkpoint.tensors import tensor_memory
from loftq_cli.checkpoint.writer import PlannedTensor, write_safetensors
from loftq_cli.containers.base import Weight
from loftq_cli.core.integers import IntegerFormat, QuantizedIntegers, dequantize_integers
from loftq_cli.formats import WHOLE_ROW

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHORT = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Written:
    directory: Path
    config: Mapping[str, Any]
    original: LlamaForCausalLM
    quantized: Mapping[str, QuantizedIntegers]  # by module

    @property
    def Q(self) -> dict[str, torch.Tensor]:
        return {module: dequantize_integers(each) for module, each in self.quantized.items()}

    def dequantized(self) -> LlamaForCausalLM:
        """The model with Q for W."""
        model = copy.deepcopy(self.original)
        for module, Q in self.Q.items():
            model.get_submodule(module).weight.data = Q
        return model.eval()


def small_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    config.dtype = dtype
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data *= 4  # so that layers matter
        parameter.data = parameter.data.to(dtype)  # and no buffer, as when it is loaded
    return model


def quantized(W: torch.Tensor, bits: int, block_size: int, seed: int = 0) -> QuantizedIntegers:
    """Scales of either sign that both 16-bit floats hold, and the codes nearest to W."""
    half, rows = 1 << (bits - 1), W.shape[0]
    fmt = IntegerFormat(bits, None if block_size == WHOLE_ROW else block_size)
    blocks = W.float().view(rows, -1, fmt.size(W.shape[1]))
    signs = torch.randint(0, 2, blocks.shape[:2], generator=torch.Generator().manual_seed(seed))
    scales = (blocks.abs().amax(dim=2) / half * (2 * signs - 1)).bfloat16().float()
    codes = (blocks / scales[:, :, None]).round().clamp(-half, half - 1).to(torch.int8)
    return QuantizedIntegers(codes.view(W.shape), scales, fmt, W.dtype)


def write_model(
    directory: Path,
    container: Any,
    bits: int | Mapping[str, int],
    dtype: torch.dtype,
    original: LlamaForCausalLM | None = None,
) -> Written:
    """The linear layers of all blocks in ``bits``, or in those by the ends of their names."""
    model = small_llama(dtype) if original is None else original
    planned: list[PlannedTensor] = []
    chunks: list[tuple[str, memoryview]] = []
    weights: list[Weight] = []
    found: dict[str, QuantizedIntegers] = {}
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        if "_proj" not in name:
            planned.append(PlannedTensor(name, SHORT[tensor.dtype], tuple(tensor.shape)))
            chunks.append((name, tensor_memory(tensor)))
            continue
        width = bits if isinstance(bits, int) else bits[module.rpartition(".")[2]]
        weight = Weight(name, module, tuple(tensor.shape), width, SHORT[tensor.dtype])
        found[module] = quantized(tensor, width, container.block_size, seed=len(found))
        planned += container.planned(weight)
        chunks += container.tensors(name, found[module])
        weights.append(weight)
    container.require_fit(weights)
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "model.safetensors", planned, chunks)
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["quantization_config"] = container.quantization_config(
        weights, ["lm_head"], SHORT[dtype]
    )
    (directory / "config.json").write_text(json.dumps(config))
    return Written(directory, config, model, found)


def tokens(count: int = 48) -> torch.Tensor:
    return torch.randint(0, 320, (2, count), generator=torch.Generator().manual_seed(1))
