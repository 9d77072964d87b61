"""One result document of each command, as data."""

from __future__ import annotations

from typing import Any

EVIL = "h.0.layer[red]evil[/]\x1b[31m|`x`\ttail\n_of_a_name_that_does_not_fit_on_a_line"


def document(command: str, results: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": f"loftq/{command}",
        "schema_version": "1.0",
        "tool": {"name": "loftq", "version": "0.1.0"},
        "argv": ["loftq", command],
        "model": {"id": "gpt2", "revision": None, "source": "hub"},
        "resolved": {"device": {"value": "cpu", "reason": "auto: no GPU"}},
        "environment": {
            "python": "3.11.7",
            "platform": "Linux",
            "machine": "x86_64",
            "cpu_count": 2,
            "memory_bytes": 24_000_000_000,
            "packages": {"torch": "2.13.0"},
            "accelerators": [],
        },
        "results": results,
        "warnings": ["beware of [bold]this[/]"],
        "timings_seconds": {"read": 0.25, "total": 41.2},
    }


def quantize(*, dry_run: bool = False) -> dict[str, Any]:
    kinds = {"attn.c_attn": (2304, 768), "attn.c_proj": (768, 768), "mlp.c_proj": (768, 3072)}
    layers = [
        {
            "name": name,
            "shape": shape,
            "bits": 4,
            "rank": 16,
            "weight_error_relative": None if dry_run else 0.0702,
            "quantized_only_error_relative": None if dry_run else 0.0936,
            "iterations": 5,
            "best_iteration": None if dry_run else 4,
            "error_curve": [] if dry_run else [0.0731, 0.0702],
            "seconds": None if dry_run else 0.41,
            "bytes": 4 * shape[0] * shape[1],
            "share_of_bytes": 0.01,
        }
        for name, shape in [
            *((f"h.{block}.{kind}", shape) for block in range(12) for kind, shape in kinds.items()),
            (EVIL, (768, 768)),
        ]
    ]
    return document(
        "quantize",
        {
            "output": "gpt2-loftq",
            "dry_run": dry_run,
            "architecture": "GPT2LMHeadModel",
            "task_type": "CAUSAL_LM",
            "settings": {
                "bits": 4,
                "quant_type": "nf4",
                "block_size": 64,
                "double_quant": True,
                "rank": 16,
                "lora_alpha": 16.0,
                "iterations": 5,
                "target_modules": "all-linear",
                "seed": 0,
            },
            "layers": layers,
            "without_adapter": [
                {
                    "name": "score",
                    "shape": (2, 768),
                    "bits": 4,
                    "reason": "not among --target-modules",
                    "quantized_only_error_relative": None if dry_run else 0.09,
                    "bytes": 6144,
                    "share_of_bytes": 0.00001,
                }
            ],
            "untouched": [
                {
                    "name": "wte.weight",
                    "shape": [50257, 768],
                    "reason": "embedding, tied to the output head",
                    "bytes": 154_389_504,
                    "share_of_bytes": 0.2817,
                }
            ],
            "totals": {
                "weight_error_relative": None if dry_run else 0.0702,
                "quantized_only_error_relative": None if dry_run else 0.0936,
                "input_bytes": 548_090_880,
                "output_bytes": 131_150_000,
                "adapter_bytes": 9_437_184,
                "peak_memory_bytes": 812_000_000,
                "parameters": 124_439_808,
                "trainable_parameters": 2_359_296,
                "seconds": None if dry_run else 41.2,
            },
        },
    )


def load() -> dict[str, Any]:
    return document(
        "load",
        {
            "architecture": "GPT2LMHeadModel",
            "parameters": 124_439_808,
            "parameter_bytes": 248_879_616,
            "bytes_by_dtype": {"bfloat16": 248_000_000, "uint8": 879_616},
            "load_seconds": 3.25,
            "peak_memory_bytes": 812_000_000,
            "device": "cpu",
            "dtype": "bfloat16",
            "quantization": "nf4",
            "quantized_layers": 48,
            "adapter": "loftq_init",
            "adapter_parameters": 2_359_296,
            "tokenizer": "GPT2TokenizerFast",
            "vocabulary_size": 50257,
        },
    )


def generate() -> dict[str, Any]:
    return document(
        "generate",
        {
            "generations": [
                {
                    "prompt": "def main",
                    "generated_text": "():\n\tprint('[red]hi[/]')\n```\x1b[2J",
                    "new_tokens": 12,
                    "seconds": 0.5,
                    "tokens_per_second": 24.0,
                },
                {
                    "prompt": "one\ttwo",
                    "generated_text": " three",
                    "new_tokens": 1,
                    "seconds": 0.1,
                    "tokens_per_second": 10.0,
                },
            ],
            "average_seconds": 0.3,
            "average_tokens_per_second": 21.7,
            "max_new_tokens": 12,
            "device": "cpu",
            "dtype": "float32",
        },
    )


ALL = {
    "quantize": quantize(),
    "quantize-dry-run": quantize(dry_run=True),
    "load": load(),
    "generate": generate(),
}
