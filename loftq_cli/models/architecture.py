"""What the model class itself says about a checkpoint: the authority on every tensor.

The class is built on torch's meta device (shapes, no memory), and transformers' own renaming
rules say which parameter each tensor of the checkpoint becomes. So what `quantize` writes and
what `from_pretrained` replaces by 4-bit layers cannot drift apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.safetensors import TensorInfo
from loftq_cli.errors import CorruptCheckpoint, UnsafeCheckpoint, UnsupportedModel, first_line
from loftq_cli.formats import DTYPE_NAMES
from loftq_cli.models import layers
from loftq_cli.models.layers import Inventory, LeftTensor, LinearLayer

TIED = "tied to another tensor"
ASSEMBLED = "put together from several tensors when the model is loaded"
NOT_IN_MODEL = "not a parameter of the model class"
SKIPPED_BY_NAME = "its name ends like that of a module which transformers leaves in 16 bits"

# PEFT's task types, by how transformers names its classes.
_TASK_TYPES = (
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
)
# The names PEFT and transformers give to the head of a model without output embeddings.
_HEADS = ("score", "classifier", "qa_outputs", "cls")


@dataclass(frozen=True)
class Architecture:
    """A model class on the meta device and what follows from it."""

    model: Any
    class_name: str
    task_type: str | None

    def inventory(self, tensors: Iterable[TensorInfo]) -> Inventory:
        """Every tensor of the checkpoint, with the module that it becomes."""
        return self._sorter.sort(tensors)

    @property
    def module_names(self) -> list[str]:
        """Paths of all modules that PEFT could put an adapter on."""
        return [name for name, module in self.model.named_modules() if hasattr(module, "weight")]

    def require_weights(self, tensors: Iterable[TensorInfo]) -> list[str]:
        """Holds the checkpoint against the class: every parameter is there, in its shape.

        transformers would fill a gap with random numbers and go on.

        Returns:
            the tensors that nothing in the class uses.

        Raises:
            CorruptCheckpoint: a parameter has no tensor, or one of another shape.
        """
        return self._sorter.require_weights(list(tensors), self.class_name)

    def trained_heads(self, tensors: Iterable[TensorInfo]) -> dict[str, str]:
        """Tensors that PEFT expects in the adapter too, each with its parameter's name.

        For these tasks PEFT trains the head beside the adapter (`modules_to_save`) and refuses
        an adapter without it.
        """
        if self.task_type not in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
            return {}
        sorter = self._sorter
        named = {info.name: sorter.parameter(info.name)[0] for info in tensors}
        return {
            tensor: parameter
            for tensor, parameter in named.items()
            if parameter.partition(".")[0] in sorter.heads
        }

    def parameters_of(self, tensors: Iterable[str]) -> dict[str, str]:
        """The parameter that each of these tensors of a checkpoint becomes."""
        return {tensor: self._sorter.parameter(tensor)[0] for tensor in tensors}

    def replaced_modules(self, skipped: Sequence[str]) -> set[str]:
        """Paths of the linear modules that transformers quantizes, given a skip list."""
        kept = [*skipped, *(self.model._keep_in_fp32_modules or ())]
        return {name for name in _linear_modules(self.model) if not _matches(name, kept)}

    def skip_modules(self, quantized: Sequence[LinearLayer]) -> list[str]:
        """Paths of all linear modules that must stay as they are, for `llm_int8_skip_modules`.

        transformers takes an explicit list verbatim, so it has to be complete: a module missing
        from it would be replaced by a 4-bit layer that has no codes to load.
        """
        stored = {layer.module for layer in quantized}
        return sorted(set(_linear_modules(self.model)) - stored)

    @cached_property
    def _sorter(self) -> _Sorter:
        return _Sorter(self.model)


def read_architecture(
    directory: Path, config: dict[str, Any], *, trust_remote_code: bool
) -> Architecture:
    """Builds the model class that ``config`` names, without memory.

    Raises:
        UnsafeCheckpoint: the class is code in the checkpoint and nobody consented to run it.
        UnsupportedModel: this transformers does not know the class.
        CorruptCheckpoint: config.json contradicts itself.
    """
    import torch
    import transformers

    if "auto_map" in config and not trust_remote_code and not _is_known(config):
        raise UnsafeCheckpoint(
            f"model type '{config.get('model_type')}' is defined by code in the checkpoint",
            cause="that code would run on this machine",
            hint="read it, pin its revision, then add --trust-remote-code",
        )
    try:
        settings = transformers.AutoConfig.from_pretrained(
            directory, trust_remote_code=trust_remote_code
        )
        model_class = _model_class(config, settings)
        with torch.device("meta"):
            if model_class is None:
                model = transformers.AutoModelForCausalLM.from_config(
                    settings, trust_remote_code=trust_remote_code
                )
            else:
                model = model_class(settings)
    except UnsupportedModel:
        raise
    except Exception as error:  # any library may object to a config in any way
        raise CorruptCheckpoint(
            f"{directory / 'config.json'}: no model can be built from it",
            cause=first_line(error),
        ) from error
    name = type(model).__name__
    return Architecture(model, name, _task_type(name, settings))


def _is_known(config: dict[str, Any]) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return config.get("model_type") in CONFIG_MAPPING_NAMES


def _model_class(config: dict[str, Any], settings: Any) -> Any:
    """The class in ``architectures``; None where only the checkpoint's own code has it."""
    import transformers

    named = config.get("architectures") or []
    found = next(
        (getattr(transformers, name, None) for name in named if isinstance(name, str)), None
    )
    if found is not None:
        return found
    if "auto_map" in config:
        return None
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if not named and type(settings) in mapping:
        return mapping[type(settings)]
    if not named and type(settings) in transformers.MODEL_MAPPING:
        return transformers.MODEL_MAPPING[type(settings)]
    raise UnsupportedModel(
        f"transformers {transformers.__version__} has no class for this model",
        cause=f"config.json names {named} for model type '{settings.model_type}'",
        hint="pip install -U transformers",
    )


def _task_type(class_name: str, settings: Any) -> str | None:
    for suffix, task_type in _TASK_TYPES:
        if class_name.endswith(suffix):
            return task_type
    if class_name.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM" if settings.is_encoder_decoder else "CAUSAL_LM"
    return None


def _linear_modules(model: Any) -> dict[str, Any]:
    """What transformers would replace: exactly nn.Linear, and any Conv1D."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Conv1D) or type(module) is nn.Linear
    }


class _Sorter:
    """Sorts a checkpoint's tensors by what the model class does with them."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.model = model
        self.state = model.state_dict()
        self.modules = dict(model.named_modules())
        self.linear = _linear_modules(model)
        self.heads = _head_modules(model)
        tied: dict[str, str] = model.all_tied_weights_keys
        self.tied = {*tied, *tied.values()}
        self.fp32 = sorted(model._keep_in_fp32_modules or ())
        rules = get_model_conversion_mapping(model)
        self.renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def sort(self, tensors: Iterable[TensorInfo]) -> Inventory:
        entries: list[LinearLayer | LeftTensor] = []
        infos = {info.name: info for info in tensors}
        for info in infos.values():
            parameter, assembled = self.parameter(info.name)
            reason = self.reason_to_leave(info, parameter, assembled)
            if reason is not None:
                entries.append(layers.leave(info, reason))
                continue
            module = parameter.removesuffix(".weight")
            transposed = type(self.linear[module]).__name__ == "Conv1D"
            entries.append(layers.layer_or_leave(info, module, transposed))
        return self.drop_unloadable(Inventory(tuple(entries)), infos)

    def require_weights(self, tensors: Sequence[TensorInfo], class_name: str) -> list[str]:
        found: set[str] = set()
        unused: list[str] = []
        several = False
        for info in tensors:
            parameter, assembled = self.parameter(info.name)
            several |= assembled
            if parameter not in self.state:
                if not _matches_any(info.name, self.model._keys_to_ignore_on_load_unexpected):
                    unused.append(info.name)
                continue
            found.add(parameter)
            shape = tuple(self.state[parameter].shape)
            if not assembled and info.shape != shape:
                raise CorruptCheckpoint(
                    f"config.json and the weights contradict each other at {info.name}",
                    cause=f"{class_name} has {shape} there, the file {info.shape}",
                    hint="the config may belong to another checkpoint: download both again",
                )
        needed = {name for name, _ in self.model.named_parameters()} - found - self.tied
        missing = sorted(
            name
            for name in needed
            if not _matches_any(name, self.model._keys_to_ignore_on_load_missing)
        )
        # One tensor that becomes several parameters is known by the first of them only.
        split = several and any(len(rule.target_patterns) > 1 for rule in self.converters)
        if missing and not split:
            raise CorruptCheckpoint(
                f"no file has the weights of {missing[0]} ({len(missing)} such parameters)",
                cause=f"config.json describes a {class_name} that has them",
                hint="the config may belong to another checkpoint: download both again",
            )
        return unused

    def parameter(self, tensor: str) -> tuple[str, bool]:
        """The parameter that ``tensor`` becomes, by transformers' own renaming rules.

        Returns:
            its name, and whether other tensors are merged into it.
        """
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        name, source = rename_source_key(
            tensor, self.renamings, self.converters, prefix, self.state
        )
        if name not in self.state and tensor in self.state:
            name, source = rename_source_key(tensor, [], [], prefix, self.state)
        return name, source is not None

    def reason_to_leave(self, info: TensorInfo, parameter: str, assembled: bool) -> str | None:
        module = parameter.removesuffix(".weight")
        owner = self.modules.get(parameter.rpartition(".")[0])
        if info.dtype not in DTYPE_NAMES:
            return layers.NOT_FLOATING_POINT
        if parameter not in self.state:
            return NOT_IN_MODEL
        if ".experts" in parameter and self.state[parameter].ndim == 3:
            return layers.STACKED_EXPERTS
        if assembled:
            return ASSEMBLED
        if len(info.shape) != 2 or 0 in info.shape:
            return layers.NOT_A_MATRIX
        kind = type(owner).__name__
        if "Embedding" in kind:
            return layers.EMBEDDING
        if any(module == head or module.startswith(f"{head}.") for head in self.heads):
            return layers.OUTPUT_HEAD
        if parameter in self.tied:
            return TIED
        if module in self.linear and parameter != module:
            return layers.KEPT_IN_FLOAT32 if _matches(module, self.fp32) else None
        if "Router" in kind or "Gate" in kind:
            return layers.ROUTER
        return layers.SUBCLASSED_LINEAR if _is_linear(owner) else f"a parameter of {kind}"

    def drop_unloadable(self, inventory: Inventory, infos: dict[str, TensorInfo]) -> Inventory:
        """Leaves layers that the skip list would hit by accident.

        transformers skips a module if an entry is the *end* of its name: with a head called
        `classifier` in the list, no layer called `…classifier` could be loaded.
        """
        skipped = sorted(set(self.linear) - {layer.module for layer in inventory.layers})
        hit = {layer for layer in inventory.layers if _matches(layer.module, skipped)}
        if not hit:
            return inventory
        entries = tuple(
            layers.leave(infos[entry.tensor], SKIPPED_BY_NAME) if entry in hit else entry
            for entry in inventory.entries
        )
        # What is left now joins the skip list, and may hit others in turn.
        return self.drop_unloadable(Inventory(entries), infos)


def _matches(module: str, patterns: Iterable[str]) -> bool:
    from transformers.quantizers.quantizers_utils import should_convert_module

    return not should_convert_module(module, list(patterns))


def _matches_any(name: str, patterns: Iterable[str] | None) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _is_linear(module: Any) -> bool:
    from torch import nn

    return isinstance(module, nn.Linear)


def _head_modules(model: Any) -> set[str]:
    """Modules that PEFT's `all-linear` leaves out: output embeddings, else the classifier."""
    output = model.get_output_embeddings()
    if output is not None:
        return {name for name, module in model.named_modules() if module is output}
    return {name for name in _HEADS if getattr(model, name, None) is not None}
