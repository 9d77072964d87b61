"""How an output is loaded: by which class, with which arguments, in which lines.

The README of the output, the page of `quantize` and the forward pass of `verify` all have it from
here.
"""

from __future__ import annotations

import json

from loftq_cli.report.escape import visible
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


def base_call(results: QuantizeResults, place: str) -> str:
    """The call that loads the backbone; ``place`` is code for where it is."""
    own_code = ", trust_remote_code=True" if results.own_code else ""
    return f"{auto_class(results)}.from_pretrained({place}{own_code})"


def quoted(name: str) -> str:
    """A directory's name as a Python string; what is not printable is spelled out in it."""
    return visible(json.dumps(name, ensure_ascii=False))
