"""The README's section on another head upon the same inner model."""

from __future__ import annotations

from loftq_cli.report.loading import (
    base_call,
    here_as_text,
    is_causal,
    keeping_layout,
    python_block,
    why_not_by_transformers,
)
from loftq_cli.schema import QuantizeResults

_ANOTHER_HEAD = """\
Classes with another head on the same inner model open this directory too, where transformers has
them for this architecture, and make a fresh head: `AutoModelForSequenceClassification`, or for
tokens `AutoModelForTokenClassification` with the task type "TOKEN_CLS". PEFT trains and saves the
head with the adapter:"""

_HIDDEN_STATES = """\
Hidden states are those of `model.get_base_model().base_model`; the class `AutoModel` has other
names for its layers than the adapter."""


def another_head(results: QuantizeResults) -> list[str]:
    """Heading and paragraphs; nothing where such classes do not open the output."""
    if results.own_code or not is_causal(results) or why_not_by_transformers(results) is not None:
        return []
    call = base_call(results, "here", auto="kind", more=["num_labels=2"])
    weights = 'here / "loftq_init" / "adapter_model.safetensors"'
    if results.repository is not None:
        weights = 'hf_hub_download(here, "loftq_init/adapter_model.safetensors")'
    lines = [
        *([] if results.repository is None else ["from huggingface_hub import hf_hub_download"]),
        "from peft import LoraConfig, get_peft_model",
        "from peft import get_peft_model_state_dict, set_peft_model_state_dict",
        "from safetensors.torch import load_file",
        "from transformers import AutoModelForSequenceClassification",
        "",
        "kind = AutoModelForSequenceClassification",
        f"classifier = {call}",
        *keeping_layout(results, "classifier"),
        'config = LoraConfig.from_pretrained(here, subfolder="loftq_init")',
        'config.task_type, config.base_model_name_or_path = "SEQ_CLS", ' + here_as_text(results),
        "classifier = get_peft_model(classifier, config)",
        "state = get_peft_model_state_dict(classifier)",
        f"state |= load_file({weights})",
        "set_peft_model_state_dict(classifier, state)",
    ]
    return ["## Another head", _ANOTHER_HEAD, python_block("\n".join(lines)), _HIDDEN_STATES]
