"""What serves an output, and what it takes for that."""

from __future__ import annotations

import textwrap

from loftq_cli.report.formats import is_quantized, stored_ranks
from loftq_cli.report.loading import auto_class
from loftq_cli.schema import QuantizeResults

# What `--max-lora-rank` may be, by vLLM 0.33.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def serving(results: QuantizeResults) -> str:
    """A list in Markdown."""
    lines = ["- transformers with PEFT, and TRL: as above."]
    quantized = is_quantized(results)
    if auto_class(results) in ("AutoModelForCausalLM", "AutoModelForImageTextToText"):
        kind = "pre-quantized bitsandbytes model" if quantized else "model"
        vllm = f"- vLLM reads this directory as a {kind} and the adapter as a LoRA module"
        rank = max(stored_ranks(results))
        taken = next((each for each in _VLLM_RANKS if each >= rank), None)
        if taken is None:
            vllm += f", but no adapter of a rank above {_VLLM_RANKS[-1]}."
        else:
            vllm += f"; give it `--max-lora-rank {taken}`."
        if quantized:
            vllm += (
                " Since 0.28 its core has no bitsandbytes: install `vllm-bnb-plugin` beside it. "
                "Pre-quantized bitsandbytes weights cannot be split over several GPUs there."
            )
        lines += [vllm, *_mis_scaled(results)]
    lines.append(
        "- llama.cpp has no such container: merge as above, then convert."
        if quantized
        else "- llama.cpp converts the model and, on its own, the adapter."
    )
    return "\n".join(
        textwrap.fill(
            line, 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        for line in lines
    )


def _mis_scaled(results: QuantizeResults) -> list[str]:
    """What SGLang would get wrong of this adapter: it divides one lora_alpha by one rank."""
    ignored, instead = [], []
    if len(stored_ranks(results)) > 1:
        ignored.append("rank patterns and alpha patterns")
        instead.append("with `--uniform-rank`")
    if results.settings.rslora:
        ignored.append("rsLoRA")
        instead.append("without `--rslora`")
    if not ignored:
        return []
    told = f"- SGLang ignores {' and '.join(ignored)}, and would scale this adapter wrongly: "
    return [f"{told}for it, write the directory {' and '.join(instead)}."]
