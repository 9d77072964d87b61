"""Which class of transformers opens a model, and what PEFT calls what the model does.

Both come from transformers' own tables, by the class of the config and that of the model, and
PEFT's word also from the model's `forward`: PEFT's wrapper for a task passes arguments of its own
to every call, and a model that does not take them (speech, images) could not be called at all.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

# The usual classes first: many models stand in several tables and are opened by each of them.
_USUAL = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForImageTextToText",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMaskedLM",
    "AutoModelForCTC",
)
# What says least of a model comes last.
_LEAST = ("AutoModelForPreTraining", "AutoModel", "AutoModelForTextEncoding")

# PEFT's word for what an Auto class' models do. Of those that write text, the config says whether
# they have an encoder.
WRITES_TEXT = {
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
}
_TASK_TYPES = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
}
# What PeftModelFor….forward of peft 0.21 passes on in every call: for all tasks, and for some.
_ALWAYS_PASSED = {
    "input_ids", "attention_mask", "inputs_embeds", "output_attentions", "output_hidden_states",
    "return_dict",
}  # fmt: skip
_PASSED = {
    "CAUSAL_LM": {"labels"},
    "SEQ_2_SEQ_LM": {
        "labels", "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds",
    },
    "SEQ_CLS": {"labels"},
    "TOKEN_CLS": {"labels"},
    "QUESTION_ANS": {"start_positions", "end_positions"},
}  # fmt: skip


def auto_class(model: Any) -> str:
    """The name of what opens exactly this model's class with `from_pretrained`.

    That is an Auto class of transformers, or the model's own class where none opens it. Of code
    that comes with the checkpoint it is what the config's `auto_map` names.
    """
    kind, config = type(model), model.config
    if has_own_code(model):
        named: dict[str, Any] = getattr(config, "auto_map", None) or {}
        autos = [name for name in named if name.startswith("AutoModel")]
        same = [name for name in autos if str(named[name]).rpartition(".")[2] == kind.__name__]
        return next(iter([*same, *autos]), "AutoModel")
    names = (name for name, opened in _opened_by(config) if opened is kind)
    return next(names, kind.__name__)


def class_named(name: str) -> Any:
    """transformers' class of that name if models are loaded with it, and None for anything else.

    The name may come from a stranger's file.
    """
    import transformers
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    found = getattr(transformers, name, None)
    loads = (transformers.PreTrainedModel, _BaseAutoModelClass)
    return found if isinstance(found, type) and issubclass(found, loads) else None


def has_own_code(model: Any) -> bool:
    """Whether the class is code that came with a checkpoint (`trust_remote_code`)."""
    return type(model).__module__.partition(".")[0] == "transformers_modules"


def task_type(auto: str, model: Any) -> str | None:
    """PEFT's task type for a model that ``auto`` opens; None where PEFT has none that can call it.

    Without one PEFT passes on whatever it is given, and `forward` works as it does without PEFT.
    """
    if auto in WRITES_TEXT:
        task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    elif auto in _TASK_TYPES:
        task = _TASK_TYPES[auto]
    else:
        return None
    takes = inspect.signature(model.forward).parameters
    passed = _ALWAYS_PASSED | _PASSED[task]
    open_ended = any(each.kind is each.VAR_KEYWORD for each in takes.values())
    called = model.main_input_name == "input_ids" and "input_ids" in takes
    return task if called and (open_ended or passed <= takes.keys()) else None


def _opened_by(config: Any) -> Iterator[tuple[str, Any]]:
    """Every Auto class that knows this config, and the class that it makes of it."""
    import transformers
    from transformers.models.auto import modeling_auto

    known = [name for name in vars(modeling_auto) if name.startswith("AutoModel")]
    others = [name for name in sorted(known) if name not in (*_USUAL, *_LEAST)]
    for name in (*_USUAL, *others, *_LEAST):
        mapping = getattr(getattr(transformers, name, None), "_model_mapping", None)
        if mapping is None or type(config) not in mapping:
            continue
        found = mapping[type(config)]
        if isinstance(found, list | tuple):  # then it goes by the name in the config
            named = config.architectures or ()
            found = next((each for each in found if each.__name__ in named), found[0])
        yield name, found
