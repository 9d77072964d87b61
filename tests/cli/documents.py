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


def calibrated() -> dict[str, Any]:
    """A run with everything that a plain one does not have: bits, ranks and errors of outputs."""
    whole = quantize()
    results = whole["results"]
    errors = {"output_error_relative": 0.02, "quantized_only_output_error_relative": 0.05}
    for number, layer in enumerate(results["layers"]):
        layer |= {"bits": 4 if number % 3 else 2, "rank": 4 + number, **errors}
    results["without_adapter"][0] |= {"weight_error_relative": 0.08, **errors}
    results["totals"] |= {"stored_bits": 4.127, "information_bits": 3.46, **errors}
    results["evened"] = [["h.0.attn.q_proj", "h.0.attn.k_proj"]]
    results["settings"] |= {
        "target_bits": 3.3,
        "rank_budget": True,
        "init": "calibrated",
        "iterations": None,
        "calibration": {"sha256": "0123456789abcdef", "windows": 4, "tokens": 4096},
        "calibration_order": "sequential",
    }
    return whole


def distilled() -> dict[str, Any]:
    """A calibrated run whose adapters were trained in the end: no errors of outputs."""
    whole = calibrated()
    results = whole["results"]
    for each in (*results["layers"], results["without_adapter"][0], results["totals"]):
        each |= {"output_error_relative": None, "quantized_only_output_error_relative": None}
    for each in results["layers"]:
        each["error_curve"] = []
    results["settings"]["distill_steps"] = 300
    results["distillation"] = {
        "steps": 300,
        "learning_rate": 2e-4,
        "batch": 8,
        "window_length": 192,
        "tokens": 4032,
        "kl_before": 0.0455,
        "kl_after": 0.0000392,
        "dtype": "float32",
        "seconds": 41.5,
    }
    return whole


def integers(container: str = "gptq", **settings: Any) -> dict[str, Any]:
    """A run in a container of integers, in whole rows unless the settings say otherwise."""
    whole = quantize()
    results = whole["results"]
    form = {"container": container, "quant_type": "int", "block_size": -1, "double_quant": False}
    results["settings"] |= form | settings
    results["without_adapter"] = []
    results["streamed_from"] = "https://hub.example"
    return whole


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


def sweep_ranks() -> dict[str, Any]:
    terms = {
        "weights_bytes": 42_467_328,
        "absmax_bytes": 5_308_416,
        "unquantized_bytes": 79_009_536,
        "adapter_bytes": 2_359_296,
        "gradients_bytes": 2_359_296,
        "optimizer_bytes": 4_718_592,
        "activations_bytes": 573_308_928,
        "activations_with_checkpointing_bytes": 66_650_112,
        "logits_bytes": 514_631_680,
        "workspace_bytes": 4_718_592,
        "context_bytes": 600_000_000,
        "total_bytes": 1_828_881_664,
        "total_with_checkpointing_bytes": 1_322_222_848,
    }
    return document(
        "sweep-ranks",
        {
            "architecture": "GPT2LMHeadModel",
            "base_parameters": 124_439_808,
            "quantized_parameters": 84_934_656,
            "modules": 48,
            "settings": {
                "target_modules": ["all-linear", EVIL],
                "bits": 4,
                "quant_type": "nf4",
                "block_size": 64,
                "batch_size": 1,
                "sequence_length": 1024,
                "vram_bytes": 1_500_000_000,
                "calibration": {"sha256": "0123456789abcdef", "windows": 4, "tokens": 4096},
            },
            "quantized_only_error_relative": 0.0936,
            "quantized_only_output_error_relative": 0.0411,
            "ranks": [
                {
                    "rank": rank,
                    "trainable_parameters": 147_456 * rank,
                    "total_parameters": 124_439_808 + 147_456 * rank,
                    "trainable_percent": 0.4718,
                    "reduction_factor": 210.98,
                    "adapter_bytes": 589_824 * rank,
                    "memory": terms,
                    "fits": rank == 4,
                    "fits_with_checkpointing": rank < 64,
                    "weight_error_relative": 0.0936 - 0.0002 * rank,
                    "weight_error_removed": 0.0002 * rank / 0.0936,
                    "output_error_relative": 0.0411 - 0.0004 * rank,
                    "output_error_removed": 0.0004 * rank / 0.0411,
                }
                for rank in (4, 16, 64)
            ],
            "verdict": {
                "recommended_rank": 4,
                "reason": "error",
                "sentence": "Rank 4: the weight error falls from 9.36 % to 9.28 %.",
            },
        },
    )


def targets() -> dict[str, Any]:
    return document(
        "targets",
        {
            "architecture": "GPT2LMHeadModel",
            "base_parameters": 124_439_808,
            "rank": 8,
            "layers": [
                {
                    "name": name,
                    "count": 12,
                    "in_features": 768,
                    "out_features": 2304,
                    "parameters": 21_233_664,
                    "share_of_parameters": 0.1706,
                    "trainable_parameters": 294_912,
                    "role": "attention-in",
                    "also_selects": also,
                }
                for name, also in (("c_attn", []), (EVIL.removeprefix("h.0."), ["c_attn", EVIL]))
            ],
            "presets": [
                {
                    "name": "attention",
                    "target_modules": ["c_attn", EVIL],
                    "modules": 12,
                    "parameters": 21_233_664,
                    "trainable_parameters": 294_912,
                    "trainable_percent": 0.2364,
                    "adapter_bytes": 1_179_648,
                }
            ],
            "skipped": [
                {
                    "name": "transformer.wte",
                    "reason": "embedding, tied to the output head",
                    "count": 1,
                    "shape": [50257, 768],
                    "parameters": 38_597_376,
                    "share_of_parameters": 0.3102,
                }
            ],
            "guessed": [EVIL],
            "without_role": ["pooler.dense"],
        },
    )


def compare() -> dict[str, Any]:
    def method(init: str, bits: int, rank: int | None, **measured: Any) -> dict[str, Any]:
        return {
            "init": init,
            "bits": bits,
            "stored_bits": max(bits, 4),
            "rank": rank,
            "weight_error_relative": 0.0936,
            "kl_divergence": 0.0123,
            "perplexity": 9.03,
            "backbone_bytes": 548_090_880 if bits == 16 else 131_150_000,
            "adapter_bytes": 9_437_184,
            "trainable_parameters": 2_359_296,
            "seconds": 12.3,
            **measured,
        }

    trained = {
        "learning_rate": 0.008,
        "rate_at_end": "highest",
        "heldout_loss_before": 2.21,
        "heldout_loss_quarter": 2.19,
        "heldout_loss_after": 2.17,
        "heldout_loss_spread": 0.0012,
        "train_seconds": 61.0,
        "loss_curve": [
            {"step": 25, "train_loss": 2.5},
            {"step": 50, "train_loss": 2.4, "heldout_loss": 2.17},
        ],
        "runs": [
            {
                "learning_rate": 0.008,
                "seed": 0,
                "ended": "finished",
                "heldout_loss_quarter": 2.19,
                "heldout_loss_after": 2.17,
                "seconds": 61.0,
                "loss_curve": [{"step": 50, "train_loss": 2.4, "heldout_loss": 2.17}],
            }
        ],
    }

    def scores(value: float) -> list[dict[str, Any]]:
        strict = {"metric": "exact_match", "filter": "strict-match", "higher_is_better": True}
        words = {"metric": "word_perplexity", "filter": None, "higher_is_better": False}
        return [
            {"task": "gsm8k", **strict, "value": value, "standard_error": 0.0123},
            {"task": EVIL, **words, "value": 100 * value, "standard_error": None},
        ]

    sentence = "At 2 bits no gain here: no start is nearer to the original than QLoRA (KL 0.0123)."
    return document(
        "compare",
        {
            "architecture": "GPT2LMHeadModel",
            "base_parameters": 124_439_808,
            "settings": {
                "text": f"{EVIL}.txt",
                "calibration_text": "built-in",
                "train_text": "train.txt",
                "predicted_tokens": 32_736,
                "window_tokens": 1024,
                "quant_type": "nf4",
                "block_size": 64,
                "double_quant": True,
                "iterations": "auto",
                "lora_alpha": None,
                "rslora": False,
                "target_modules": ["all-linear"],
                "seed": 0,
                "train_steps": 50,
                "batch_windows": 8,
                "learning_rate": None,
                "warmup_steps": 0,
                "training": {
                    "learning_rates": [0.004, 0.008],
                    "seeds": [0],
                    "optimizer": "adamw_torch_fused",
                    "lr_scheduler": "linear",
                    "weight_decay": 0.0,
                    "max_grad_norm": 1.0,
                },
                "tasks": [
                    {"name": "gsm8k", "version": "3.0", "shots": 5, "questions": 1319},
                    {"name": EVIL, "version": "1.0", "shots": None, "questions": 62},
                ],
            },
            "methods": [
                method(
                    "original",
                    16,
                    None,
                    kl_divergence=0.0,
                    weight_error_relative=0.0,
                    scores=scores(0.31),
                ),
                method("lora", 16, 16, kl_divergence=0.0, weight_error_relative=0.0, **trained),
                method(
                    "qlora",
                    2,
                    16,
                    error_removed=0.0,
                    kl_gain=1.0,
                    **trained,
                    scores=scores(0.12),
                    trained_scores=scores(0.21),
                ),
                method("calibrated", 2, 16, kl_divergence=None, perplexity=None, **trained),
            ],
            "verdict": {
                "sentence": sentence,
                "bits": [
                    {
                        "bits": 2,
                        "init": "qlora",
                        "rank": 16,
                        "gain": False,
                        "kl_gain": 1.0,
                        "trained_init": "calibrated",
                        "trained_rank": 16,
                        "trained_margin": 0.0001,
                        "trained_margin_error": 0.0003,
                        "trained_gain": False,
                        "sentence": sentence,
                    }
                ],
                "tasks": [
                    {
                        "task": "gsm8k",
                        "metric": "exact_match",
                        "filter": "strict-match",
                        "trained": True,
                        "bits": 2,
                        "container": "bitsandbytes",
                        "block_size": 64,
                        "init": "qlora",
                        "rank": 16,
                        "value": 0.21,
                        "margin": 0.0,
                        "margin_error": 0.0174,
                        "gain": False,
                        "sentence": "On gsm8k no start is better than QLoRA: 0.210 ± 0.012.",
                    }
                ],
            },
        },
    )


def check() -> dict[str, Any]:
    results = {
        "tests": [
            {
                "name": "4-bit quantization",
                "group": "hardware",
                "status": "passed",
                "seconds": 0.5,
                "verified": "codes equal the reference",
                "detail": "6,266,880 codes equal the reference's",
                "figures": {"codes_compared": 6_266_880, "ties_decided_otherwise": 3},
            },
            {
                "name": "efficiency",
                "group": "model",
                "status": "passed",
                "seconds": 0.1,
                "verified": "share, reduction and size of the adapter at each rank",
                "detail": "as PEFT saves them",
                "rows": [
                    {
                        "rank": rank,
                        "trainable_parameters": 147_456 * rank,
                        "trainable_percent": 0.118 * rank,
                        "reduction_factor": 843.9 / rank,
                        "adapter_bytes": 589_824 * rank,
                        "memory_bytes": 1_500_000_000 + rank,
                        "newer": None,
                    }
                    for rank in (4, 8)
                ],
            },
            {
                "name": "reload",
                "group": "main job",
                "status": "failed",
                "seconds": 1.0,
                "verified": "bitsandbytes and PEFT make of the files what was measured",
                "detail": f"{EVIL} is not what quantize measured",
                "cause": "its residual is 0.2 by the files, and 0.1 was reported",
                "hint": "pip install -U bitsandbytes",
            },
        ],
        "summary": {"total": 3, "passed": 2, "failed": 1, "skipped": 0, "seconds": 1.6},
    }
    return document("check", results)


def verify() -> dict[str, Any]:
    first = {
        "group": "directory",
        "seconds": 0.05,
        "verified": "every file is there with the size and hash of the report, and no other is",
    }
    return document(
        "verify",
        {
            "directory": "gpt2-loftq",
            "source": "gpt2",
            "quantized_layers": 48,
            "measured_layers": 2,
            "tests": [
                {
                    **first,
                    "name": "files",
                    "status": "passed",
                    "detail": "8 files, 140.6 MB: sizes and SHA-256 as reported",
                    "figures": {"files": 8, "hashed_bytes": 140_587_442},
                },
                {
                    **first,
                    "name": "residuals",
                    "status": "failed",
                    "detail": f"{EVIL} does not leave the residual that was reported",
                    "cause": f"{EVIL} leaves 0.089983, reported was 0.089816",
                    "hint": "copy it again",
                },
                {
                    **first,
                    "name": "forward",
                    "status": "skipped",
                    "detail": "not run: nothing is known about the inputs of GPT2Model",
                    "cause": "nothing is known about the inputs of GPT2Model",
                },
            ],
            "layers": [
                {
                    "name": "h.0.attn.c_attn",
                    "shape": (2304, 768),
                    "weight_error_relative": 0.0702,
                    "reported_weight_error_relative": 0.0702,
                    "agrees": True,
                },
                {
                    "name": EVIL,
                    "shape": (768, 768),
                    "weight_error_relative": 0.089983,
                    "reported_weight_error_relative": 0.089816,
                    "agrees": False,
                },
            ],
            "summary": {"total": 3, "passed": 1, "failed": 1, "skipped": 1, "seconds": 0.15},
        },
    )


def export() -> dict[str, Any]:
    return document(
        "export",
        {
            "source": "gpt2-loftq",
            "output": "gpt2-served",
            "source_container": "gptq",
            "container": "compressed-tensors",
            "quantized_layers": 48,
            "files": [
                {"name": "config.json", "bytes": 1_300, "sha256": "0123456789abcdef"},
                {"name": f"{EVIL}.json", "bytes": 12, "sha256": "fedcba9876543210"},
            ],
            "input_bytes": 131_150_000,
            "output_bytes": 130_010_000,
            "source_stored_bits": 4.3125,
            "stored_bits": 4.25,
            "seconds": 4.2,
        },
    )


def merge() -> dict[str, Any]:
    return document(
        "merge",
        {
            "source": "gpt2-loftq",
            "adapter": f"trained/{EVIL}",
            "output": "gpt2-merged",
            "source_container": "bitsandbytes",
            "dtype": "bfloat16",
            "quantized_layers": 48,
            "merged_layers": 48,
            "replaced": ["score.weight"],
            "files": [
                {"name": "config.json", "bytes": 900, "sha256": "0123456789abcdef"},
                {"name": f"{EVIL}.json", "bytes": 12, "sha256": "fedcba9876543210"},
            ],
            "input_bytes": 131_150_000,
            "output_bytes": 248_880_000,
            "checked_layers": 8,
            "output_deviation": 0.00188,
            "seconds": 4.2,
        },
    )


def requantized() -> dict[str, Any]:
    """The same, quantized again."""
    whole = merge()
    layers = [
        {key: each[key] for key in ("name", "shape", "bits", "weight_error_relative")}
        for each in requantized_layers()
    ]
    whole["results"]["requantized"] = {
        "container": "bitsandbytes",
        "quant_type": "nf4",
        "block_size": 64,
        "double_quant": False,
        "stored_bits": 4.5,
        "weight_error_relative": 0.0312,
        "layers": layers,
    }
    return whole


def requantized_report() -> dict[str, Any]:
    """The report of what that writes."""
    whole = quantize()
    whole["results"] |= {
        "merged": {"source": "gpt2-loftq", "adapter": f"trained/{EVIL}"},
        "without_adapter": requantized_layers(),
        "layers": [],
    }
    return whole


def requantized_layers() -> list[dict[str, Any]]:
    layers = quantize()["results"]["layers"]
    kept = ("name", "shape", "bits", "weight_error_relative", "bytes", "share_of_bytes")
    return [{**{key: each[key] for key in kept}, "reason": "merged"} for each in layers]


def push() -> dict[str, Any]:
    return document(
        "push",
        {
            "directory": "gpt2-loftq",
            "repository": "org/gpt2-loftq",
            "url": "https://huggingface.co/org/gpt2-loftq",
            "private": True,
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "files": [
                {"name": "config.json", "bytes": 1_300, "sha256": "0123456789abcdef"},
                {"name": f"{EVIL}.json", "bytes": 12, "sha256": "fedcba9876543210"},
            ],
            "deleted": [f"old-{EVIL}.safetensors"],
            "bytes": 131_151_312,
            "seconds": 42.5,
        },
    )


def report() -> dict[str, Any]:
    return document(
        "report",
        {
            "systems": [load()["environment"]],
            "documents": [
                {"file": f"results/{EVIL}.json", "document": load()},
                {"file": "-", "document": check()},
            ],
            "findings": [{"command": "load", "model": "gpt2", "text": f"{EVIL} is slow"}],
            "recommendations": [{"command": "check", "model": None, "text": "buy a *new* box"}],
            "skipped": [{"file": "results/config.json", "reason": "this is not JSON"}],
        },
    )


ALL = {
    "quantize": quantize(),
    "quantize-dry-run": quantize(dry_run=True),
    "quantize-calibrated": calibrated(),
    "quantize-distilled": distilled(),
    "quantize-integers": integers(),
    "load": load(),
    "generate": generate(),
    "sweep-ranks": sweep_ranks(),
    "targets": targets(),
    "compare": compare(),
    "check": check(),
    "verify": verify(),
    "export": export(),
    "merge": merge(),
    "merge-requantized": requantized(),
    "quantize-merged": requantized_report(),
    "push": push(),
    "report": report(),
}
