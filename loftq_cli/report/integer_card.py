"""What the README of an output says of containers of integers alone.

Each has a library that packs and unpacks it; one is trained on packed, the other is served.
"""

from __future__ import annotations

from loftq_cli.report.escape import shell_word
from loftq_cli.report.loading import (
    base_call,
    can_take_adapter,
    own_experts,
    why_not_by_transformers,
)
from loftq_cli.schema import QuantizeResults

GPTQ, COMPRESSED_TENSORS = "gptq", "compressed-tensors"

# What pip is asked for beside transformers and PEFT; the extras of these names have the same.
REQUIREMENTS = {
    GPTQ: ("gptqmodel>=7.3", "optimum>=2.0"),
    COMPRESSED_TENSORS: ("compressed-tensors>=0.18", "transformers>=5.17"),
}

_PINNED = """\
gptqmodel is built from its sources, and its newest release asks for the newest torch: without the
pin pip replaces yours. With it pip takes the newest gptqmodel that goes with your torch."""

_DENSE = """\
Before 0.18 compressed-tensors packed 3 bits in another way; `dequantize` came to transformers by
5.17."""

_KERNEL = """\
`backend="torch"` trains at all bits, on any device. Left to itself gptqmodel takes its fastest
kernel for inference. Most of those refuse to train; the one for 4 bits on a CPU does not, and after
an evaluation its gradients are wrong in silence. On a GPU, "auto_trainable" finds a faster one that
trains (read in gptqmodel's source and not run here; on a CPU it is the wrong one of before)."""

_BY_GPTQMODEL = """\
transformers itself does not load this directory: {reason}.
gptqmodel's loader does; it wants the tokenizer beside the weights. `BACKEND.GPTQ_TORCH` is its
kernel that trains everywhere; most others are for inference alone."""

_DEQUANTIZED = """\
That dequantizes every layer: PEFT puts no adapter on the packed ones, which have no weight. So a
model takes the memory of one in 16 bits here."""

_TWIN = """\
To train with the weights packed, write the same codes and scales for gptqmodel, where PEFT trains
on them as they are:

```sh
{export}
```

Nothing is rounded on the way. An adapter that was trained there is exact here, and the other way
round."""

_DEQUANTIZED_EXPERTS = """\
Experts are dequantized too. Made with `--experts quantize` they stay packed while PEFT trains the
other layers: in bitsandbytes' 4 bits, loaded by `loftq_cli.load`, and with `--container gptq` by
gptqmodel, which knows those of Qwen and DeepSeek-V3. Made again with `--experts keep`, which leaves
them in 16 bits, the directory goes into gptqmodel's container (`loftq export`), where the rest
stays packed."""

_PACKED = """\
The weights stay packed while it trains. A LoRA of your own on them needs its `target_modules` by
name: PEFT's "all-linear" looks for torch's layers, and finds none of gptqmodel's."""

_MIXED = """\
Its layers have more than one width. vLLM reads each. transformers does not: {reason}.
So nothing puts an adapter on this directory for training. The same codes and scales in gptqmodel's
container are trained on:

```sh
{export}
```

Nothing is rounded on the way: an adapter that was trained there is exact here."""

_OWN_EXPERTS = """\
Its experts lie one by one, where the original had them as stacks. transformers does not load them:
{reason}. What does is loftq, dequantized
(`loftq generate`, `loftq compare`); `loftq merge` writes the stacks again, in 16 bits, with what
was trained. Made again with `--experts keep`, the directory loads in transformers, its experts in
16 bits."""

_NOT_QUANTIZED_AGAIN = """\
Leave the `loftq` options of PEFT and of your trainer off: they would quantize once more, and the
adapter corrects exactly the weights stored here."""

_DTYPE = """\
Give no `dtype`, or "auto", which is the same: in another one each weight is rounded to other
values than those that the adapter corrects. """

_WHERE_IT_IS = """\
The last line says where the backbone is. PEFT looks there when it saves embeddings that you
resized (do that before the adapter goes on), and `AutoPeftModel...`, which wants the same
`quantization_config`, when it loads what you trained."""

_WHERE_IT_IS_FOR_PEFT = """\
The last line says where the backbone is. PEFT looks there when it saves embeddings that you
resized (do that before the adapter goes on)."""

_MERGED_ELSEWHERE = """\
PEFT merges nothing into packed layers. Write the same codes and scales as compressed-tensors, where
they are dequantized:

```sh
{export}
```

Nothing is rounded on the way, and the README there merges what you trained here."""

_MERGED_NOWHERE = """\
PEFT merges nothing into packed layers, and {reason}.
Serve backbone and adapter side by side."""


_MERGE_FIRST = """

For benchmarks, merge first: lm-evaluation-harness loads the layers packed, and PEFT finds no weight
in them."""


def install(results: QuantizeResults) -> str:
    """The section of this name: pip's line, and what to mind."""
    lines = "\n".join(["```sh", *install_lines(results), "```"])
    if results.settings.container == GPTQ:
        return f"Beside transformers and PEFT:\n\n{lines}\n\n{_PINNED}"
    return f"Beside PEFT:\n\n{lines}\n\n{_DENSE}"


def install_lines(results: QuantizeResults) -> list[str]:
    """What to type; nothing for containers that PEFT's own requirements read."""
    container = results.settings.container
    asked = " ".join(f'"{each}"' for each in REQUIREMENTS.get(container, ()))
    if container == GPTQ:
        version = "import torch; print(torch.__version__.split('+')[0])"
        return [f'torch=$(python -c "{version}")', f'pip install "torch==$torch" {asked}']
    return [f"pip install {asked}"] if asked else []


def export_line(place: str, container: str) -> str:
    """What writes the same codes and scales in another container."""
    return f"loftq export {shell_word(place)} --container {container} --output OUT"


def loaded(results: QuantizeResults, stored: str) -> list[str]:
    """Paragraphs after the lines that load it; ``stored`` is a sentence on its dtype."""
    reason = why_not_by_transformers(results)
    where = _WHERE_IT_IS if reason is None else _WHERE_IT_IS_FOR_PEFT
    if results.settings.container == COMPRESSED_TENSORS:
        how = _DEQUANTIZED
    else:
        how = _KERNEL if reason is None else _BY_GPTQMODEL.format(reason=reason)
    return [where, how, _NOT_QUANTIZED_AGAIN, _DTYPE + stored]


def trained(results: QuantizeResults, here: str) -> str:
    """A paragraph on training, or on where to do it."""
    export = export_line(here, GPTQ)
    if own_experts(results):
        return _OWN_EXPERTS.format(reason=why_not_by_transformers(results))
    if not can_take_adapter(results):
        return _MIXED.format(reason=why_not_by_transformers(results), export=export)
    if results.settings.container == GPTQ:
        return _PACKED
    if results.experts is not None and results.experts.quantized:
        return _DEQUANTIZED_EXPERTS
    return _TWIN.format(export=export)


def merged(results: QuantizeResults, here: str) -> str | list[str]:
    """The lines of Python that merge, or the words for why there are none."""
    if results.settings.container == COMPRESSED_TENSORS:
        return [
            f"base = {base_call(results, 'here')}",
            'merged = PeftModel.from_pretrained(base, "trained-adapter").merge_and_unload()',
            'merged.save_pretrained("merged", save_original_format=False)',
        ]
    if results.conv1d:
        reason = "compressed-tensors, where it would, does not hold Conv1D layers"
    elif why_not_by_transformers(results) is not None:
        reason = "transformers dequantizes layers of one width only"
    else:
        return _MERGED_ELSEWHERE.format(export=export_line(here, COMPRESSED_TENSORS))
    return _MERGED_NOWHERE.format(reason=reason)


def benchmarks(results: QuantizeResults) -> str | None:
    """To go on from the loss on a text, where the usual tool does not take the directories."""
    if results.settings.container == COMPRESSED_TENSORS:
        return _MERGE_FIRST
    return None if why_not_by_transformers(results) is None else ""
