"""The README of an output directory: what it is and how to load, train, merge and serve it."""

from __future__ import annotations

import shlex
import textwrap
from pathlib import PurePath

from loftq_cli import starts
from loftq_cli.report import units
from loftq_cli.report.formats import (
    all_layers,
    bits_a_weight,
    code_bits,
    error_changes,
    is_quantized,
    number_type,
    rank_range,
    stored_ranks,
)
from loftq_cli.report.loading import auto_class, base_call, quoted
from loftq_cli.schema import Document, QuantizeResults

_INT8 = """\
A word on 8 bits: bitsandbytes' int8 layers also quantize the *activations* that flow into them,
row by row, in every forward pass (LLM.int8()). A fixed adapter cannot correct that, and what
rounding weights to 8 bits loses is small to begin with: expect little from the LoftQ start here.
Its use is at 4 bits and below."""

_NO_SECOND_QUANTIZATION = """\
Give no `quantization_config` of your own and leave the `loftq` options of PEFT and of your trainer
off: they would quantize once more, and the adapter corrects exactly the weights stored here."""

_DTYPE = """\
Give no `dtype` either. transformers takes what is quantized as it is stored and converts only a
part of the rest, and the first forward pass fails where the two meet. """

_OTHER_DTYPE = """\
For a card without bfloat16 (T4, V100, RTX 20) make the directory with `loftq quantize --dtype
float16`."""

_DROPOUT = """\
Only the adapter is trained. Keep its dropout at 0: dropout drops part of the correction too."""

_UNCORRECTED = "Only the adapter is trained."

_MERGE_PLAIN = """\
The weights are those of the original model, so the trained adapter goes onto either."""

_FEWER_BITS = """\
Codes of 2 and 3 bits are stored as 4: bitsandbytes' container has no smaller ones, and every
runtime that reads it reads these. The size of the files is that of 4 bits."""

_WHERE_TO_MERGE = """\
The adapter corrects the *quantized* weights. Merge it into what they dequantize to, never into the
original model: there it would add the quantization error instead of taking it away. Quantizing the
merged model again loses the correction again."""


def card(document: Document[QuantizeResults]) -> str:
    """Markdown whose code runs as it stands, from the directory that holds the output."""
    results = document.results
    here = PurePath(results.output).name
    auto = auto_class(results)
    quantized = is_quantized(results)
    corrects = starts.of_report(results.settings.init).corrects
    dtype = results.settings.dtype
    stored = _OTHER_DTYPE if dtype is None else f"All that is not quantized is stored in {dtype}."
    parts = [
        f"# {here}",
        _introduction(document),
        _figures(results),
        "## Load",
        _python(f"""
            from peft import PeftModel
            from transformers import {auto}

            model = {base_call(results, quoted(here))}
            model = PeftModel.from_pretrained(
                model, {quoted(here)}, subfolder="loftq_init", is_trainable=True
            )
            """),
        *([_NO_SECOND_QUANTIZATION, _DTYPE + stored] if quantized else []),
        "## Fine-tune",
        _python("""
            from transformers import Trainer, TrainingArguments

            arguments = TrainingArguments("runs", learning_rate=2e-4, num_train_epochs=1)
            trainer = Trainer(model, arguments, train_dataset=train_dataset)  # your tokenized data
            trainer.train()
            model.save_pretrained("trained-adapter")
            """),
        _DROPOUT if corrects else _UNCORRECTED,
        "## Merge",
        _WHERE_TO_MERGE if quantized else _MERGE_PLAIN,
        _merging(results, here),
        "## Evaluate",
        _evaluation(results, here),
        "## Serve",
        _serving(results),
    ]
    if results.settings.quant_type == "int8":
        parts.insert(3, _INT8)
    in_file = code_bits(results.settings.quant_type)
    if any((layer.bits or in_file) < in_file for layer in all_layers(results)):
        parts.insert(3, _FEWER_BITS)
    return "\n\n".join(parts) + "\n"


def _introduction(document: Document[QuantizeResults]) -> str:
    settings, model = document.results.settings, document.model
    source = "a model" if model is None else f"`{model.id}`"
    if model is not None and model.revision is not None:
        source += f" (revision `{model.revision}`)"
    return (
        f"{source}{_form(document.results)}, and in `loftq_init/` a LoRA adapter of "
        f"{_ranks(document.results)}. The adapter {starts.of_report(settings.init).sentence}. "
        f"Written by loftq {document.tool.version}; `loftq_report.json` has every figure."
    )


def _form(results: QuantizeResults) -> str:
    settings = results.settings
    if not is_quantized(results):
        return ", its weights as they were"
    form = "one scale a row"
    if settings.block_size is not None:
        form = f"blocks of {settings.block_size}"
        form += ", double quantization" if settings.double_quant else ""
    return f", its linear layers in {number_type(results)} ({form})"


def _ranks(results: QuantizeResults) -> str:
    low, high = rank_range(results)
    if low == high:
        return f"rank {low}"
    stored = stored_ranks(results)
    padded = "" if len(stored) > 1 else f", padded to {max(stored)} where B is zero"
    return f"ranks {low} to {high}{padded}"


def _figures(results: QuantizeResults) -> str:
    totals = results.totals
    rows = [
        ("weights before", units.size(totals.input_bytes)),
        ("weights now", units.size(totals.output_bytes)),
        ("adapter", f"{units.number(totals.trainable_parameters)} parameters"),
    ]
    bits = bits_a_weight(results)
    if bits is not None:
        rows.insert(2, ("precision", bits))
    changes = error_changes(results)
    rows += [(what, units.error_change(before, after)) for what, before, after in changes]
    parts = ["\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])]
    if changes:
        parts.append(
            "Errors are relative, in the Frobenius norm, over all quantized layers; the first is "
            "what plain quantization (QLoRA) leaves, the second what backbone and adapter leave "
            "together."
        )
    calibration = results.settings.calibration
    if calibration is not None and any(what == "output error" for what, *_ in changes):
        tokens = f" ({units.number(calibration.tokens)} tokens)" if calibration.tokens else ""
        parts[-1] += (
            f" The output error is that of the layers' outputs for the inputs that the original "
            f"model gives them on the calibration text{tokens}."
        )
    return "\n\n".join(parts)


def _merging(results: QuantizeResults, here: str) -> str:
    if not is_quantized(results):
        return _python(f"""
            base = {base_call(results, quoted(here))}
            merged = PeftModel.from_pretrained(base, "trained-adapter").merge_and_unload()
            merged.save_pretrained("merged")
            """)
    lines = [
        f"base = {base_call(results, quoted(here))}.dequantize()",
        'merged = PeftModel.from_pretrained(base, "trained-adapter").merge_and_unload()',
    ]
    state = ""
    if results.conv1d:
        ends = tuple(f"{name}.weight" for name in results.conv1d)
        lines += [
            "# This architecture's Conv1D layers store (in, out); dequantize() turned them round.",
            "state = merged.state_dict()",
            "for name in state:",
            f"    if name.endswith({ends}):",
            "        state[name] = state[name].T.contiguous()",
        ]
        state = "state_dict=state, "
    # transformers cannot yet reverse the reading of bitsandbytes' format, and need not.
    lines.append(f'merged.save_pretrained("merged", {state}save_original_format=False)')
    return _python("\n".join(lines))


def _evaluation(results: QuantizeResults, here: str) -> str:
    if results.task_type not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        return (
            "Compare its outputs with those of the original on inputs of your own, before and "
            "after training."
        )
    arguments = shlex.quote(f"pretrained={here},peft={here}/loftq_init")
    return (
        "The loss on a text of yours, to be held against the original model's:\n\n"
        + _python(f"""
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained({quoted(here)})
            inputs = tokenizer(text, return_tensors="pt")  # your text
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            """)
        + "\n\nFor benchmarks, lm-evaluation-harness takes the two directories:\n\n"
        "```sh\n"
        f"lm_eval --model hf --model_args {arguments} --tasks ...\n"
        "```"
    )


def _serving(results: QuantizeResults) -> str:
    ranks = stored_ranks(results)
    kind, more = "model", ""
    converter = "llama.cpp converts the model and, on its own, the adapter."
    if is_quantized(results):
        kind = "pre-quantized bitsandbytes model"
        more = " Pre-quantized bitsandbytes weights cannot be split over several GPUs there."
        converter = "llama.cpp has no such container: merge as above, then convert."
    if len(ranks) > 1:
        more += (
            " It ignores rank patterns, and this adapter has ranks that differ: for vLLM write it "
            "with `loftq quantize --uniform-rank`, which pads them to one."
        )
    vllm = f"vLLM reads this directory as a {kind} and the adapter as a LoRA module"
    lines = [
        "- transformers with PEFT, and TRL: as above.",
        f"- {vllm}; give it `--max-lora-rank {max(ranks)}`.{more}",
        f"- {converter}",
    ]
    return "\n".join(
        textwrap.fill(
            line, 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        for line in lines
    )


def _python(code: str) -> str:
    return f"```python\n{textwrap.dedent(code).strip()}\n```"
