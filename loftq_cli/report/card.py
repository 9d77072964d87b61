"""The README of an output directory: what it is and how to load, train, merge and serve it."""

from __future__ import annotations

import json
import shlex
import textwrap
from pathlib import PurePath

from loftq_cli.report import units
from loftq_cli.report.quantize import auto_class
from loftq_cli.schema import Document, QuantizeResults

_INT8 = """\
A word on 8 bits: bitsandbytes' int8 layers also quantize the *activations* that flow into them,
row by row, in every forward pass (LLM.int8()). A fixed adapter cannot correct that, and what
rounding weights to 8 bits loses is small to begin with: expect little from the LoftQ start here.
Its use is at 4 bits and below."""

_NO_SECOND_QUANTIZATION = """\
Give no `quantization_config` of your own and leave the `loftq` options of PEFT and of your trainer
off: they would quantize once more, and the adapter corrects exactly the weights stored here."""

_DROPOUT = """\
Only the adapter is trained. Keep its dropout at 0: dropout drops part of the correction too."""

_WHERE_TO_MERGE = """\
The adapter corrects the *quantized* weights. Merge it into what they dequantize to, never into the
original model: there it would add the quantization error instead of taking it away. Quantizing the
merged model again loses the correction again."""


def card(document: Document[QuantizeResults]) -> str:
    """Markdown whose code runs as it stands, from the directory that holds the output."""
    results = document.results
    here = PurePath(results.output).name
    auto = auto_class(results)
    parts = [
        f"# {here}",
        _introduction(document),
        _figures(results),
        "## Load",
        _python(f"""
            from peft import PeftModel
            from transformers import {auto}

            model = {auto}.from_pretrained({quoted(here)})
            model = PeftModel.from_pretrained(
                model, {quoted(here)}, subfolder="loftq_init", is_trainable=True
            )
            """),
        _NO_SECOND_QUANTIZATION,
        "## Fine-tune",
        _python("""
            from transformers import Trainer, TrainingArguments

            arguments = TrainingArguments("runs", learning_rate=2e-4, num_train_epochs=1)
            trainer = Trainer(model, arguments, train_dataset=train_dataset)  # your tokenized data
            trainer.train()
            model.save_pretrained("trained-adapter")
            """),
        _DROPOUT,
        "## Merge",
        _WHERE_TO_MERGE,
        _merging(results, here, auto),
        "## Evaluate",
        _evaluation(results, auto),
        "## Serve",
        f"""\
- transformers with PEFT, and TRL: as above.
- vLLM reads this directory as a pre-quantized bitsandbytes model and the adapter as a LoRA module;
  give it `--max-lora-rank {results.settings.rank}`. Pre-quantized bitsandbytes weights cannot be
  split over several GPUs there.
- llama.cpp has no such container: merge as above, then convert.""",
    ]
    if results.settings.bits == 8:
        parts.insert(3, _INT8)
    return "\n\n".join(parts) + "\n"


def _introduction(document: Document[QuantizeResults]) -> str:
    settings, model = document.results.settings, document.model
    source = "a model" if model is None else f"`{model.id}`"
    if model is not None and model.revision is not None:
        source += f" (revision `{model.revision}`)"
    form = "int8, one scale a row"
    if settings.block_size is not None:
        double = ", double quantization" if settings.double_quant else ""
        form = f"{settings.quant_type}, blocks of {settings.block_size}{double}"
    start = "LoftQ start" if settings.init == "loftq" else "start that corrects nothing (QLoRA)"
    return (
        f"{source}, its linear layers in {settings.bits} bits ({form}), and in `loftq_init/` a "
        f"LoRA adapter of rank {settings.rank} with the {start}. "
        f"Written by loftq {document.tool.version}; `loftq_report.json` has every figure."
    )


def _figures(results: QuantizeResults) -> str:
    totals = results.totals
    rows = [
        ("weights before", units.size(totals.input_bytes)),
        ("weights now", units.size(totals.output_bytes)),
        ("adapter", f"{units.number(totals.trainable_parameters)} parameters"),
    ]
    if totals.quantized_only_error_relative is not None:
        rows.append(
            ("error of the quantized weights", units.percent(totals.quantized_only_error_relative))
        )
    if totals.weight_error_relative is not None:
        rows.append(("error with the adapter", units.percent(totals.weight_error_relative)))
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return (
        "\n".join(lines)
        + "\n\nErrors are relative, in the Frobenius norm, over all quantized layers."
    )


def _merging(results: QuantizeResults, here: str, auto: str) -> str:
    lines = [
        f"base = {auto}.from_pretrained({quoted(here)}).dequantize()",
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


def _evaluation(results: QuantizeResults, auto: str) -> str:
    if results.task_type not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        return (
            "Compare its outputs with those of the original on inputs of your own, before and "
            "after training."
        )
    here = PurePath(results.output).name
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


def quoted(name: str) -> str:
    """A directory's name as a Python string."""
    return json.dumps(name, ensure_ascii=False)


def _python(code: str) -> str:
    return f"```python\n{textwrap.dedent(code).strip()}\n```"
