"""The demo as an OPT: the same trained weights and the same function of them, in plain linear
layers, which every container has (GPT-2's are Conv1D).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GPT2LMHeadModel, OPTConfig, OPTForCausalLM
from transformers.pytorch_utils import Conv1D

from loftq_cli.checkpoint.index import open_checkpoint
from loftq_cli.containers import container_of
from loftq_cli.containers.base import Container, Weight
from loftq_cli.core.integers import QuantizedIntegers, dequantize_integers
from loftq_cli.models.spec import DEMO_DIRECTORY
from tests.containers.integer_models import SHORT

BLOCK = {
    "ln_1": ["self_attn_layer_norm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.c_proj": ["self_attn.out_proj"],
    "ln_2": ["final_layer_norm"],
    "mlp.c_fc": ["fc1"],
    "mlp.c_proj": ["fc2"],
}
REST = {"wte": ["embed_tokens"], "wpe": ["embed_positions"], "ln_f": ["final_layer_norm"]}


def load_demo(dtype: torch.dtype) -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(DEMO_DIRECTORY, dtype=dtype).eval()


def as_opt(gpt2: GPT2LMHeadModel) -> OPTForCausalLM:
    """None of its weights and biases is rounded."""
    given = gpt2.config
    config = OPTConfig(
        vocab_size=given.vocab_size, hidden_size=given.n_embd, ffn_dim=4 * given.n_embd,
        num_hidden_layers=given.n_layer, num_attention_heads=given.n_head, dropout=0.0,
        max_position_embeddings=given.n_positions, activation_function=given.activation_function,
        bos_token_id=given.bos_token_id, eos_token_id=given.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    model = OPTForCausalLM(config).to(gpt2.dtype)
    blocks = zip(gpt2.transformer.h, model.model.decoder.layers, strict=True)
    pairs = [(REST, gpt2.transformer, model.model.decoder), *((BLOCK, *pair) for pair in blocks)]
    for names, theirs, ours in pairs:
        for name, parts in names.items():
            fill(theirs.get_submodule(name), [ours.get_submodule(part) for part in parts])
    return model.eval()


def fill(theirs: torch.nn.Module, ours: list[torch.nn.Module]) -> None:
    for name, parameter in theirs.named_parameters(recurse=False):
        whole = parameter.data.t() if isinstance(theirs, Conv1D) else parameter.data
        for part, module in zip(whole.chunk(len(ours)), ours, strict=True):
            getattr(module, name).data[-len(part) :] = part  # OPT's positions begin at 2


def save_demo_opt(directory: Path) -> Path:
    """A checkpoint that `quantize` takes, with the demo's tokenizer."""
    as_opt(load_demo(torch.bfloat16)).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_DIRECTORY / name, directory)
    return directory


@dataclass(frozen=True)
class WrittenOpt:
    """A directory that `quantize` made of a demo-OPT, and what is in it by our own reading."""

    directory: Path
    source: Path
    document: Any

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, json.loads((self.directory / "config.json").read_text())["dtype"])

    @property
    def container(self) -> Container:
        settings = self.document.results.settings
        return container_of(settings.container, settings.bits, settings)

    @property
    def bits(self) -> dict[str, int]:
        return {layer.name: layer.bits for layer in self.document.results.layers}

    def quantized(self) -> dict[str, QuantizedIntegers]:
        """Codes and scales by module."""
        tensors, container = open_checkpoint(self.directory).tensors, self.container
        found = {}
        for layer in self.document.results.layers:
            weight = Weight(f"{layer.name}.weight", layer.name, tuple(layer.shape), layer.bits,
                            SHORT[self.dtype])  # fmt: skip
            found[layer.name] = container.quantized(container.read(tensors, weight, "cpu"))
        return found

    def Q(self) -> dict[str, torch.Tensor]:
        return {module: dequantize_integers(each) for module, each in self.quantized().items()}

    def original(self) -> OPTForCausalLM:
        """In the dtype that the directory was written in."""
        return OPTForCausalLM.from_pretrained(self.source, dtype=self.dtype).eval()

    def dequantized(self) -> OPTForCausalLM:
        """The original with Q for W."""
        model = self.original()
        for module, Q in self.Q().items():
            model.get_submodule(module).weight.data = Q
        return model


def windows(count: int, length: int) -> torch.Tensor:
    """Of the demo's held-out text, which it was not trained on: token ids (count × length)."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_DIRECTORY)
    text = (DEMO_DIRECTORY / "heldout.txt").read_text("utf-8")[: 8 * count * length]
    tokens = [token for line in text.splitlines(True) for token in tokenizer(line).input_ids]
    return torch.tensor(tokens[: count * length]).view(count, length)
