"""How an output is loaded: by which class, with which arguments, in which lines.

The README of the output, the page of `quantize` and the forward pass of `verify` all have it from
here.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from loftq_cli.report.escape import visible
from loftq_cli.report.formats import all_layers, code_bits, is_quantized
from loftq_cli.schema import QuantizeResults

# By PEFT's task type, for reports that do not name the class.
_BY_TASK = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def auto_class(results: QuantizeResults) -> str:
    """The name of transformers' class that loads the output; it is an identifier of Python."""
    name = results.auto_class or _BY_TASK.get(results.task_type or "", results.architecture)
    return name if name.isidentifier() else "AutoModel"


def quantization(results: QuantizeResults) -> tuple[str, dict[str, Any]] | None:
    """What transformers has to be told to load a backbone that takes an adapter.

    A class of its own and the arguments of that; None where the directory says it all. Bits and all
    else that is stored transformers has from the directory, whatever is given here.
    """
    match results.settings.container:
        case "compressed-tensors":  # else its layers have no weight, which PEFT asks for
            return "CompressedTensorsConfig", {"dequantize": True}
        case "gptq":  # else the kernel is the fastest for inference, which may not train
            return "GPTQConfig", {"bits": results.settings.bits, "backend": "torch"}
    return None


def for_other_readers(results: QuantizeResults) -> bool:
    """Whether experts are quantized as transformers 4 loads them, and 5 does not."""
    experts = results.experts
    packed = experts is not None and experts.quantized > 0 and experts.loader is None
    return packed and results.settings.container == "bitsandbytes"


def own_experts(results: QuantizeResults) -> bool:
    """Whether experts are quantized as loftq loads them, and transformers does not."""
    return results.experts is not None and results.experts.loader == "loftq"


def why_not_by_transformers(results: QuantizeResults) -> str | None:
    """Why transformers (5.24) cannot load the backbone for an adapter; None: it can."""
    container = results.settings.container
    mixed = len({layer.bits for layer in all_layers(results)}) > 1
    if container == "gptq" and results.conv1d:
        return "classes with Conv1D layers set weights that packed layers do not have"
    experts = results.experts
    if container == "gptq" and experts is not None and experts.quantized:
        return "its rules stack experts before it knows that they are packed"
    if container == "gptq" and mixed:
        return "it hands optimum one width for all layers"
    if own_experts(results):
        return "it has no rule that stacks the quantized experts of this class"
    if container == "compressed-tensors" and mixed:
        return "it dequantizes all layers by the first config group"
    return None


def can_take_adapter(results: QuantizeResults) -> bool:
    """Whether some library loads the backbone with layers that PEFT puts an adapter on."""
    unread = why_not_by_transformers(results) is not None
    return not (unread and results.settings.container == "compressed-tensors")


def import_lines(results: QuantizeResults) -> list[str]:
    """What :func:`load_lines` need."""
    adapter = ["from peft import PeftModel"] if results.merged is None else []
    if why_not_by_transformers(results) is not None:
        return ["from gptqmodel import BACKEND, GPTQModel", *adapter]
    told = quantization(results)
    names = [auto_class(results), *([] if told is None else [told[0]])]
    return [*adapter, f"from transformers import {', '.join(names)}"]


def here_lines(results: QuantizeResults) -> list[str]:
    """What a README begins with: imports, and `here`, where the output is."""
    imports = import_lines(results)
    if results.repository is not None:
        return [*imports, "", f"here = {quoted(results.repository)}"]
    place = f"Path({quoted(PurePath(results.output).name)}).resolve()"
    return ["from pathlib import Path", "", *imports, "", f"here = {place}"]


def here_as_text(results: QuantizeResults) -> str:
    """Code for `here` as a string."""
    return "str(here)" if results.repository is None else "here"


def load_lines(results: QuantizeResults, place: str, text: str | None = None) -> list[str]:
    """The backbone as `model`.

    ``place`` is code for where it is, and ``text`` for that as a string, if it is none.
    """
    if why_not_by_transformers(results) is not None:
        own_code = ", trust_remote_code=True" if results.own_code else ""
        call = f"GPTQModel.load({text or place}, backend=BACKEND.GPTQ_TORCH{own_code})"
        return [f"model = {call}.model"]
    return [*quantization_line(results), f"model = {base_call(results, place)}"]


def quantization_line(results: QuantizeResults) -> list[str]:
    """What :func:`base_call` refers to, where it does."""
    told = quantization(results)
    if told is None:
        return []
    name, arguments = told
    given = ", ".join(f"{key}={_literal(value)}" for key, value in arguments.items())
    return [f"quantization = {name}({given})"]


def base_call(
    results: QuantizeResults, place: str, auto: str | None = None, more: Sequence[str] = ()
) -> str:
    """The call that loads the backbone; ``place`` is code for where it is."""
    arguments = [place, *more]
    if quantization(results) is not None:
        arguments.append("quantization_config=quantization")
    if results.own_code:
        arguments.append("trust_remote_code=True")
    return f"{auto or auto_class(results)}.from_pretrained({', '.join(arguments)})"


def _literal(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


def quoted(name: str) -> str:
    """A directory's name as a Python string; what is not printable is spelled out in it."""
    return visible(json.dumps(name, ensure_ascii=False))


def keeps_adapter_dtype(results: QuantizeResults) -> bool:
    """Whether the adapter is to stay in the dtype that it and the packed codes have.

    FSDP wants one dtype; PEFT makes adapters in 16 bits float32 unless it is told.
    """
    settings = results.settings
    return settings.quant_storage == settings.adapter_dtype != "float32"


def adapter_lines(results: QuantizeResults, place: str) -> list[str]:
    """The adapter on `model`, as in :func:`load_lines`."""
    given = f'model, {place}, subfolder="loftq_init", is_trainable=True'
    if not keeps_adapter_dtype(results):
        return [f"model = PeftModel.from_pretrained({given})"]
    return [
        "model = PeftModel.from_pretrained(",
        f"    {given}, autocast_adapter_dtype=False",
        ")",
    ]


def is_repacked(results: QuantizeResults) -> bool:
    """Whether bitsandbytes may rearrange the weights in place."""
    return is_quantized(results) and code_bits(results.settings.quant_type) == 4


def keeping_layout(results: QuantizeResults, model: str) -> list[str]:
    """What keeps 4-bit weights as they lie, on a CPU that would rearrange them."""
    if not is_repacked(results):
        return []
    return [
        f"for layer in {model}.modules():  # before anything else",
        "    layer.support_avx512bf16_for_cpu = False",
    ]


def is_causal(results: QuantizeResults) -> bool:
    """Whether it writes text from left to right, for PEFT too."""
    return (auto_class(results), results.task_type) == ("AutoModelForCausalLM", "CAUSAL_LM")


def python_block(code: str) -> str:
    """Lines of Python as Markdown has them."""
    return f"```python\n{textwrap.dedent(code).strip()}\n```"
