"""Makes a checkpoint of a well-known size with made-up weights, to try the tool at scale.

    python examples/make_checkpoint.py gpt2 ./gpt2-shaped
    python examples/make_checkpoint.py llama-7b ./7b-shaped            # 13 GB
    python examples/make_checkpoint.py qwen3-30b-a3b ./30b-a3b         # 61 GB, most of it experts
    python examples/make_checkpoint.py llama-405b ./405b --headers-only # sparse files, no weights
    python examples/make_checkpoint.py deepseek-v3 ./671b --headers-only

Every matrix is W = 0.02·N(0, 1) + 0.002·(rank 128), in bfloat16: a flat spectrum with a low-rank
part, about what trained weights look like to a quantizer. One tensor is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

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
    "qwen3-30b-a3b": {
        **LLAMA,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    },
    "deepseek-v3": {
        **LLAMA,
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
}

Shapes: TypeAlias = Iterator[tuple[str, tuple[int, ...]]]


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


def decoder_tensors(config: dict[str, Any]) -> Iterator[PlannedTensor]:
    """Of Llama, of Qwen3 with experts, and of DeepSeek-V3."""
    d, vocabulary = config["hidden_size"], config["vocab_size"]
    yield PlannedTensor("model.embed_tokens.weight", "BF16", (vocabulary, d))
    for block in range(config["num_hidden_layers"]):
        for part in (attention(config), feed_forward(config, block), norms(config)):
            for name, shape in part:
                yield PlannedTensor(f"model.layers.{block}.{name}", "BF16", shape)
    yield PlannedTensor("model.norm.weight", "BF16", (d,))
    yield PlannedTensor("lm_head.weight", "BF16", (vocabulary, d))


def attention(config: dict[str, Any]) -> Shapes:
    d, heads = config["hidden_size"], config["num_attention_heads"]
    if "kv_lora_rank" in config:
        yield from latent_attention(config)
        return
    head = config.get("head_dim", d // heads)
    kv = head * config["num_key_value_heads"]
    yield "self_attn.q_proj.weight", (head * heads, d)
    yield "self_attn.k_proj.weight", (kv, d)
    yield "self_attn.v_proj.weight", (kv, d)
    yield "self_attn.o_proj.weight", (d, head * heads)
    if config["model_type"] == "qwen3_moe":
        yield "self_attn.q_norm.weight", (head,)
        yield "self_attn.k_norm.weight", (head,)


def latent_attention(config: dict[str, Any]) -> Shapes:
    d, heads = config["hidden_size"], config["num_attention_heads"]
    q, kv, rope = (config[key] for key in ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim"))
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    yield "self_attn.q_a_proj.weight", (q, d)
    yield "self_attn.q_a_layernorm.weight", (q,)
    yield "self_attn.q_b_proj.weight", (heads * (nope + rope), q)
    yield "self_attn.kv_a_proj_with_mqa.weight", (kv + rope, d)
    yield "self_attn.kv_a_layernorm.weight", (kv,)
    yield "self_attn.kv_b_proj.weight", (heads * (nope + value), kv)
    yield "self_attn.o_proj.weight", (d, heads * value)


def feed_forward(config: dict[str, Any], block: int) -> Shapes:
    """One for every token, or a router with experts, with those that all tokens share."""
    d = config["hidden_size"]
    experts = config.get("num_experts", config.get("n_routed_experts", 0))
    if not experts or block < config.get("first_k_dense_replace", 0):
        yield from gated("mlp", d, config["intermediate_size"])
        return
    wide = config["moe_intermediate_size"]
    yield "mlp.gate.weight", (experts, d)
    if "n_group" in config:
        yield "mlp.gate.e_score_correction_bias", (experts,)
    for number in range(experts):
        yield from gated(f"mlp.experts.{number}", d, wide)
    if shared := config.get("n_shared_experts"):
        yield from gated("mlp.shared_experts", d, shared * wide)


def gated(path: str, d: int, wide: int) -> Shapes:
    yield f"{path}.gate_proj.weight", (wide, d)
    yield f"{path}.up_proj.weight", (wide, d)
    yield f"{path}.down_proj.weight", (d, wide)


def norms(config: dict[str, Any]) -> Shapes:
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{name}.weight", (config["hidden_size"],)


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
    tensors = gpt2_tensors(config) if arguments.shape == "gpt2" else decoder_tensors(config)
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
