"""What serves an output, and what it takes for that."""

from __future__ import annotations

import textwrap

from loftq_cli.formats import DEFAULT_STORAGE, WHOLE_ROW
from loftq_cli.report.escape import shell_word
from loftq_cli.report.formats import all_layers, in_integers, is_quantized, stored_ranks
from loftq_cli.report.loading import (
    auto_class,
    can_take_adapter,
    own_experts,
    why_not_by_transformers,
)
from loftq_cli.report.units import listed
from loftq_cli.schema import QuantizeResults

# What `--max-lora-rank` may be, by vLLM 0.33.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# The widths that every server has kernels for.
_COMMON_BITS = {4, 8}
_SERVED = ("AutoModelForCausalLM", "AutoModelForImageTextToText")
# Read in the sources of both.
_OTHER_STORAGE = (
    "- vLLM and SGLang refuse any `bnb_4bit_quant_storage` but uint8. Made again without "
    "`--quant-storage`, the directory has the same bytes in such tensors, and takes the adapter "
    "that you trained on this one."
)

_ON_PARAMETERS = (
    "- The adapter is on parameters of experts too (`target_parameters`). Whether a server takes "
    "that was not tried: merge it, or leave experts out of `--target-modules`."
)

_OWN_EXPERTS = (
    "- vLLM reads experts one by one of some such models, of Gemma 4 by its source; it was not "
    "tried, and of others nothing is known here."
)


def serving(results: QuantizeResults, here: str) -> str:
    """Markdown: a list, and before it the command line where that has options of its own."""
    integers = in_integers(results)
    lines, command = [], ""
    if can_take_adapter(results):
        lines.append("- transformers with PEFT, and TRL: as above.")
    if auto_class(results) in _SERVED:
        if own_experts(results):
            lines.append(_OWN_EXPERTS)
        elif integers:
            line = vllm_line(results, here)
            command = "" if line is None else f"```sh\n{line}\n```\n\n"
            lines += [_vllm_integers(results), *_sglang(results)]
        elif results.settings.quant_storage in (None, DEFAULT_STORAGE):
            lines.append(_vllm(results))
        else:
            lines.append(_OTHER_STORAGE)
        lines += [f"- {each}" for each in _mis_scaled(results)]
        if results.expert_adapters is not None:
            lines.append(_ON_PARAMETERS)
    lines.append(_llama_cpp(results))
    return command + "\n".join(
        textwrap.fill(
            line, 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        for line in lines
    )


def vllm_line(results: QuantizeResults, place: str) -> str | None:
    """The command line that serves the directory of integers; None where vLLM takes no such rank.

    Read in vLLM 0.33's source.
    """
    rank = _vllm_rank(results)
    if rank is None:
        return None
    words = [
        f"vllm serve {shell_word(place)} --enable-lora",
        f"--lora-modules {shell_word(f'tuned={place}/loftq_init')} --max-lora-rank {rank}",
    ]
    # Marlin, which it takes gptq to, has 4 and 8 bits.
    if results.settings.container == "gptq" and _widths(results) - _COMMON_BITS:
        words.append("--quantization humming")
    return " ".join(words)


def cautions(results: QuantizeResults) -> list[str]:
    """What servers refuse of the adapter, or would get wrong."""
    refused = []
    if _vllm_rank(results) is None:
        refused.append(f"vLLM takes no adapter of a rank above {_VLLM_RANKS[-1]}")
    return refused + _mis_scaled(results)


def _widths(results: QuantizeResults) -> set[int]:
    return {layer.bits or results.settings.bits for layer in all_layers(results)}


def _vllm_rank(results: QuantizeResults) -> int | None:
    rank = max(stored_ranks(results))
    return next((each for each in _VLLM_RANKS if each >= rank), None)


def _vllm(results: QuantizeResults) -> str:
    quantized = is_quantized(results)
    kind = "pre-quantized bitsandbytes model" if quantized else "model"
    vllm = f"- vLLM reads this directory as a {kind} and the adapter as a LoRA module"
    taken = _vllm_rank(results)
    if taken is None:
        vllm += f", but no adapter of a rank above {_VLLM_RANKS[-1]}."
    else:
        vllm += f"; give it `--max-lora-rank {taken}`."
    if quantized:
        vllm += (
            " Since 0.28 its core has no bitsandbytes: install `vllm-bnb-plugin` beside it. "
            "Pre-quantized bitsandbytes weights cannot be split over several GPUs there."
        )
    return vllm


def _vllm_integers(results: QuantizeResults) -> str:
    container = results.settings.container
    if _vllm_rank(results) is None:
        told = (
            f"- vLLM reads this directory, but no adapter of a rank above {_VLLM_RANKS[-1]}, by "
            "the source of 0.33."
        )
    else:
        told = (
            "- vLLM: the line above, and the adapter is the model `tuned` of its API. What you "
            "trained takes the place of `loftq_init`. That was read in the source of vLLM 0.33 "
            "and not run here."
        )
    if fewer := sorted(_widths(results) - _COMMON_BITS):
        told += (
            f" For {listed(fewer)} bits {container} has Humming's kernels there, on GPUs of "
            "compute capability 7.5 and above."
        )
    if results.settings.block_size != WHOLE_ROW:
        told += " Over several GPUs, every part of a row has to be whole blocks."
    if results.conv1d:
        told += " Its class for GPT-2 took no adapter in earlier versions."
    return told


def _sglang(results: QuantizeResults) -> list[str]:
    container = results.settings.container
    read = f"- SGLang reads 4 and 8 bits of {container}, by the source of 0.5.23"
    if _widths(results) <= _COMMON_BITS:
        return [f"{read} and not run here."]
    return [f"{read}; of others nothing is known here."]


def _llama_cpp(results: QuantizeResults) -> str:
    if not is_quantized(results):
        return "- llama.cpp converts the model and, on its own, the adapter."
    told = "- llama.cpp has no such container"
    merges = why_not_by_transformers(results) is None
    return f"{told}: merge as above, then convert." if merges else f"{told}."


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
    told = f"SGLang ignores {' and '.join(ignored)}, and would scale this adapter wrongly: "
    return [f"{told}for it, write the directory {' and '.join(instead)}."]
