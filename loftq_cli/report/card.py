"""The README of an output directory: what it is and how to load, train, merge and serve it."""

from __future__ import annotations

import re
from pathlib import PurePath

from loftq_cli import starts
from loftq_cli.report import distilled, integer_card, units
from loftq_cli.report.another_head import another_head
from loftq_cli.report.escape import code_span, shell_word, visible
from loftq_cli.report.experts import adapters_told, told
from loftq_cli.report.formats import (
    all_layers,
    bits_a_weight,
    blocks_of,
    code_bits,
    error_changes,
    in_integers,
    is_quantized,
    number_type,
    rank_range,
    stored_ranks,
)
from loftq_cli.report.loading import (
    adapter_lines,
    base_call,
    can_take_adapter,
    for_other_readers,
    here_as_text,
    here_lines,
    is_causal,
    is_repacked,
    keeping_layout,
    load_lines,
    python_block,
    quoted,
    why_not_by_transformers,
)
from loftq_cli.report.merge import requantized_card
from loftq_cli.report.serving import serving
from loftq_cli.report.sharded import sharded
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
Give no `dtype` either, or "auto", which is the same. With any other transformers takes what is
quantized as it is stored and converts only a part of the rest, and the first forward pass fails
where the two meet. """

_OTHER_DTYPE = """\
For a card without bfloat16 (T4, V100, RTX 20) make the directory with
`loftq quantize --dtype float16`."""

_WHERE_IT_IS = """\
The last line says where the backbone is. PEFT looks there when it saves embeddings that you
resized (do that before the adapter goes on), and `AutoPeftModel...` when it loads what you
trained."""

_TRANSFORMERS_4 = """\
These lines are for transformers 4 with PEFT 0.18 (4.57 and 0.18.1 were tried). transformers 5 loads
no quantized experts in bitsandbytes: it stacks them before it knows that they are packed. There
loftq has a loader of its own, with which experts stay packed too:

{load}

Train with activation checkpointing, or each block's experts stay dequantized from the forward pass
to the backward. `adapter="trained-adapter"` loads what was trained, and `loftq merge` writes it in
16 bits."""

_ON_PARAMETERS = """\
The adapter is on experts too, by PEFT's `target_parameters`: that takes PEFT 0.20 or later, which
has A and B of experts the other way round than before."""

_ADAPTER_LEFT_OUT = """\
What loads the directory in one call, such as `pipeline`, loads the backbone without its adapter and
does not say so. Give it the `model` of above instead."""

_ON_A_CPU = """\
On a CPU with native bfloat16, bitsandbytes rearranges 4-bit weights in place in the first forward
pass outside of training. An adapter that is put on after that, training and saving would be wrong
in silence; the loop over the layers prevents it."""

_WITHOUT_ADAPTER = """\
So `disable_adapter()` is not the original model. The reference model that DPO and its like need is
one with the untrained adapter: recent TRL copies it, if it is given the `model` of above; elsewhere
there is `model.load_adapter(here, "reference", subfolder="loftq_init")`."""

_MERGED_IN_PLACE = """\
On the quantized layers themselves `merge_adapter()`, `unmerge_adapter()` and `merge_and_unload()`
round the weights again, in silence, and a part of the correction is lost."""

# For LoRA on large models, as QLoRA's authors have it.
_RATE, _HALF_OF_IT = "2e-4", "1e-4"

_HALVED = """\
its adapter holds more of the weights, and a step moves it further"""

_OWN_RATE = """\
What suits your model and data, each start by itself, finds `loftq compare --model MODEL
--train-steps 100 --train-text FILE --text OTHER-FILE`."""

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
original model: there it would add the quantization error instead of taking it away. `loftq merge`
does that one tensor at a time, from this directory and the one of the trained adapter. Quantizing
the merged model again loses the correction again; `loftq merge --requantize` says how much."""

_A_COPY = """\
Python needs no more than the name of this repository. The command lines below are for a copy on the
disk, of which `loftq` can tell that nothing has changed on the way:"""

# Of a name in the title: links, tags and code.
_MARKUP, _ESCAPED = re.compile(r"([\\`\[\]<>])"), r"\\\1"


def card(document: Document[QuantizeResults]) -> str:
    """Markdown whose code runs as it stands, from the directory that holds the output."""
    results = document.results
    here = PurePath(results.repository or results.output).name
    if results.merged is not None:
        return requantized_card(results, results.merged, here)
    parts = [
        f"# {_MARKUP.sub(_ESCAPED, visible(here))}",
        _introduction(document),
        _figures(results),
        *_download(results, here),
        *(_used(results, here) if can_take_adapter(results) else _only_served(results, here)),
        "## Serve",
        serving(results, here),
    ]
    if results.settings.quant_type == "int8":
        parts.insert(3, _INT8)
    in_file = code_bits(results.settings.quant_type)
    if any((layer.bits or in_file) < in_file for layer in all_layers(results)):
        parts.insert(3, _FEWER_BITS)
    return "\n\n".join(parts) + "\n"


def _download(results: QuantizeResults, here: str) -> list[str]:
    """To begin with, where the directory is a hub's: what command lines want."""
    if results.repository is None:
        return []
    place = shell_word(here)
    lines = f"hf download {shell_word(results.repository)} --local-dir {place}"
    return ["## Download", _A_COPY, f"```sh\n{lines}\nloftq verify {place}\n```"]


def _used(results: QuantizeResults, here: str) -> list[str]:
    """Everything that is done in Python, from loading on."""
    quantized, integers = is_quantized(results), in_integers(results)
    corrects = starts.of_report(results.settings.init).corrects
    dtype = results.settings.dtype
    stored = _OTHER_DTYPE if dtype is None else f"All that is not quantized is stored in {dtype}."
    if integers:
        notes = integer_card.loaded(results, stored)
    else:
        notes = [
            _WHERE_IT_IS,
            *([_ON_A_CPU] if is_repacked(results) else []),
            *([_NO_SECOND_QUANTIZATION, _DTYPE + stored] if quantized else []),
        ]
    if why_not_by_transformers(results) is None:
        notes.insert(1, _ADAPTER_LEFT_OUT)
    if results.expert_adapters is not None:
        notes.insert(1, _ON_PARAMETERS)
    if for_other_readers(results):
        notes.insert(1, _TRANSFORMERS_4.format(load=_by_our_loader(results)))
    return [
        *(["## Install", integer_card.install(results)] if integers else []),
        "## Load",
        _loading(results),
        *notes,
        "## Fine-tune",
        _training(results),
        _DROPOUT if corrects else _UNCORRECTED,
        *([integer_card.trained(results, here)] if integers else []),
        *sharded(results),
        *(["## The backbone alone", _backbone(results)] if quantized and corrects else []),
        "## Merge",
        _WHERE_TO_MERGE if quantized else _MERGE_PLAIN,
        *([_MERGED_IN_PLACE] if quantized and not integers else []),
        _merging(results, here),
        *another_head(results),
        "## Evaluate",
        _evaluation(results, here),
    ]


def _only_served(results: QuantizeResults, here: str) -> list[str]:
    return ["## Fine-tune", integer_card.trained(results, here)]


def _loading(results: QuantizeResults) -> str:
    lines = [
        *here_lines(results),
        *load_lines(results, "here", here_as_text(results)),
        *keeping_layout(results, "model"),
        *adapter_lines(results, "here"),
        'model.peft_config["default"].base_model_name_or_path = ' + here_as_text(results),
    ]
    return python_block("\n".join(lines))


def _by_our_loader(results: QuantizeResults) -> str:
    place = quoted(results.repository or PurePath(results.output).name)
    own_code = ", trust_remote_code=True" if results.own_code else ""
    trainable = ", trainable=True" if results.totals.adapter_bytes else ""
    return python_block(f"""
        import loftq_cli

        model = loftq_cli.load({place}{trainable}{own_code})
        """)


def _backbone(results: QuantizeResults) -> str:
    totals = results.totals
    alone, together = totals.backbone_error_relative, totals.weight_error_relative
    figures = ""
    if alone is not None and together is not None:
        figures = (
            f" Without it the quantized weights are {units.percent(alone)} off those of the "
            f"original, with it {units.percent(together)}."
        )
    return f"The adapter is part of this model.{figures}\n\n{_WITHOUT_ADAPTER}"


def _training(results: QuantizeResults) -> str:
    settings = results.settings
    halved = settings.bits <= starts.of_report(settings.init).half_rate_up_to
    rate = _HALF_OF_IT if halved else _RATE
    code = python_block(f"""
        from transformers import Trainer, TrainingArguments

        arguments = TrainingArguments("runs", learning_rate={rate}, num_train_epochs=1)
        trainer = Trainer(model, arguments, train_dataset=train_dataset)  # your prepared data
        trainer.train()
        model.save_pretrained("trained-adapter")
        """)
    text = f"{_RATE} is where most begin with LoRA"
    if halved:
        text += f", and half of that is for this start: {_HALVED}"
    return f"{code}\n\n{text}." + (f" {_OWN_RATE}" if is_causal(results) else "")


def _introduction(document: Document[QuantizeResults]) -> str:
    settings, model = document.results.settings, document.model
    source = "a model" if model is None else code_span(model.id)
    if model is not None and model.revision is not None:
        source += f" (revision {code_span(model.revision)})"
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
        form = blocks_of(settings.block_size)
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
    if results.experts is not None:
        rows.append(("experts", told(results.experts)))
    if (adapters := results.expert_adapters) is not None:
        rows.append(("adapters of experts", adapters_told(adapters, totals.trainable_parameters)))
    changes = error_changes(results)
    rows += [(what, units.error_change(before, after)) for what, before, after in changes]
    parts = ["\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])]
    if changes:
        parts.append(
            "Errors are relative, in the Frobenius norm, over all quantized layers; the first is "
            "what plain quantization (QLoRA) leaves, the second what backbone and adapter leave "
            "together."
        )
        if results.expert_adapters is not None:
            parts[-1] += " Those of experts are in it without their adapters."
    calibration = results.settings.calibration
    if calibration is not None and any(what == "output error" for what, *_ in changes):
        tokens = f" ({units.number(calibration.tokens)} tokens)" if calibration.tokens else ""
        seen = f"for the inputs that the original model gives them on the calibration text{tokens}"
        if results.settings.calibration_order == "sequential":
            seen = (
                f"on the calibration text{tokens}, held against the original's: each layer is "
                "given what the quantized layers before it leave"
            )
        parts[-1] += f" The output error is that of the layers' outputs {seen}."
    return "\n\n".join([*parts, *distilled.paragraph(results)])


def _merging(results: QuantizeResults, here: str) -> str:
    if in_integers(results):
        how = integer_card.merged(results, here)
        return how if isinstance(how, str) else python_block("\n".join(how))
    base = base_call(results, "here")
    if not is_quantized(results):
        return python_block(f"""
            base = {base}
            merged = PeftModel.from_pretrained(base, "trained-adapter").merge_and_unload()
            merged.save_pretrained("merged")
            """)
    lines = [
        f"base = {base}.dequantize()",
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
    return python_block("\n".join(lines))


def _evaluation(results: QuantizeResults, here: str) -> str:
    if results.task_type not in ("CAUSAL_LM", "SEQ_2_SEQ_LM") or not _has_tokenizer(results):
        return (
            "Compare its outputs with those of the original on inputs of your own, before and "
            "after training."
        )
    return (
        "The loss on a text of yours, to be held against the original model's:\n\n"
        + python_block("""
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(here)
            inputs = tokenizer(text, return_tensors="pt")  # your text
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            """)
        + (_benchmarks(here) if (other := integer_card.benchmarks(results)) is None else other)
    )


def _benchmarks(here: str) -> str:
    arguments = shell_word(f"pretrained={here},peft={here}/loftq_init")
    return (
        "\n\nFor benchmarks, lm-evaluation-harness takes the two directories:\n\n"
        "```sh\n"
        f"lm_eval --model hf --model_args {arguments} --tasks ...\n"
        "```"
    )


def _has_tokenizer(results: QuantizeResults) -> bool:
    """Whether one lies there, as far as the report says."""
    names = [file.name for file in results.files]
    return not names or any(name.startswith(("tokenizer", "vocab", "spiece")) for name in names)
