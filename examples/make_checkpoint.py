"""Makes a checkpoint of a well-known size with made-up weights, to try the tool at scale.

    python examples/make_checkpoint.py gpt2 ./gpt2-shaped
    python examples/make_checkpoint.py llama-7b ./7b-shaped            # 13 GB
    python examples/make_checkpoint.py llama-405b ./405b --headers-only # sparse files, no weights

Every matrix is W = 0.02·N(0, 1) + 0.002·(rank 128), in bfloat16: a flat spectrum with a low-rank
part, about what trained weights look like to a quantizer. One tensor is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from loftq_cli.checkpoint.writer import PlannedTensor, write_safetensors

SHARD_BYTES = 4_500_000_000
LOW_RANK = 128

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "dtype": "bfloat16",
    },
    "llama-tiny": {
        **LLAMA,
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
    "llama-7b": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama-70b": {
        **LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "llama-405b": {
        **LLAMA,
        "vocab_size": 128256,
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
    },
}


def gpt2_tensors(config: dict[str, Any]) -> Iterator[PlannedTensor]:
    d = config["n_embd"]
    yield PlannedTensor("wte.weight", "BF16", (config["vocab_size"], d))
    yield PlannedTensor("wpe.weight", "BF16", (config["n_positions"], d))
    for block in range(config["n_layer"]):
        for norm in ("ln_1", "ln_2"):
            yield PlannedTensor(f"h.{block}.{norm}.weight", "BF16", (d,))
            yield PlannedTensor(f"h.{block}.{norm}.bias", "BF16", (d,))
        for name, rows, columns in (
            ("attn.c_attn", d, 3 * d),
            ("attn.c_proj", d, d),
            ("mlp.c_fc", d, 4 * d),
            ("mlp.c_proj", 4 * d, d),
        ):  # Conv1D: (in, out)
            yield PlannedTensor(f"h.{block}.{name}.weight", "BF16", (rows, columns))
            yield PlannedTensor(f"h.{block}.{name}.bias", "BF16", (columns,))
    yield PlannedTensor("ln_f.weight", "BF16", (d,))
    yield PlannedTensor("ln_f.bias", "BF16", (d,))


def llama_tensors(config: dict[str, Any]) -> Iterator[PlannedTensor]:
    d, wide, vocabulary = (
        config[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    yield PlannedTensor("model.embed_tokens.weight", "BF16", (vocabulary, d))
    for block in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{block}"
        for name, rows, columns in (
            ("self_attn.q_proj", d, d),
            ("self_attn.k_proj", kv, d),
            ("self_attn.v_proj", kv, d),
            ("self_attn.o_proj", d, d),
            ("mlp.gate_proj", wide, d),
            ("mlp.up_proj", wide, d),
            ("mlp.down_proj", d, wide),
        ):
            yield PlannedTensor(f"{prefix}.{name}.weight", "BF16", (rows, columns))
        yield PlannedTensor(f"{prefix}.input_layernorm.weight", "BF16", (d,))
        yield PlannedTensor(f"{prefix}.post_attention_layernorm.weight", "BF16", (d,))
    yield PlannedTensor("model.norm.weight", "BF16", (d,))
    yield PlannedTensor("lm_head.weight", "BF16", (vocabulary, d))


def weights(planned: list[PlannedTensor], generator: torch.Generator) -> Iterator[tuple[str, Any]]:
    """Made where the generator is: on a GPU that takes seconds."""
    device = generator.device
    for tensor in planned:
        if len(tensor.shape) == 1:
            fill = 0.0 if tensor.name.endswith("bias") else 1.0
            W = torch.full(tensor.shape, fill)
        else:
            rows, columns = tensor.shape
            rank = min(LOW_RANK, rows, columns)
            left = torch.randn(rows, rank, generator=generator, device=device)
            right = torch.randn(rank, columns, generator=generator, device=device)
            W = torch.randn(rows, columns, generator=generator, device=device).mul_(0.02)
            W.addmm_(left, right, alpha=0.002)
        yield tensor.name, memoryview(W.bfloat16().cpu().view(torch.uint8).numpy().reshape(-1))


def shards(tensors: list[PlannedTensor]) -> list[list[PlannedTensor]]:
    groups: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.nbytes > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    return groups


def write_sparse(path: Path, planned: list[PlannedTensor]) -> None:
    """A header over a hole: the file has its size and takes no room."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in planned:
        end = offset + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + offset)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", choices=CONFIGS)
    parser.add_argument("output", type=Path)
    parser.add_argument("--headers-only", action="store_true", help="sparse files without weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where the weights are made")
    arguments = parser.parse_args()

    config = CONFIGS[arguments.shape]
    tensors = gpt2_tensors(config) if arguments.shape == "gpt2" else llama_tensors(config)
    groups = shards(list(tensors))
    arguments.output.mkdir(parents=True)
    (arguments.output / "config.json").write_text(json.dumps(config, indent=2))
    generator = torch.Generator(arguments.device).manual_seed(arguments.seed)
    weight_map = {}
    for number, planned in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        if len(groups) == 1:
            name = "model.safetensors"
        print(name, flush=True)
        weight_map |= {tensor.name: name for tensor in planned}
        if arguments.headers_only:
            write_sparse(arguments.output / name, planned)
        else:
            write_safetensors(arguments.output / name, planned, weights(planned, generator))
    if len(groups) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (arguments.output / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main()
