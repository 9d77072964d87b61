"""What the model class itself says about a checkpoint: the authority on every tensor.

The class is built on torch's meta device (shapes, no memory), and transformers' own renaming
rules say which parameter each tensor of the checkpoint becomes. So what `quantize` writes and
what `from_pretrained` replaces by 4-bit layers cannot drift apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.safetensors import TensorInfo
from loftq_cli.errors import CorruptCheckpoint, UnsafeCheckpoint, UnsupportedModel, told_as
from loftq_cli.formats import DTYPE_NAMES
from loftq_cli.models import layers
from loftq_cli.models.auto_classes import auto_class, has_own_code, task_type
from loftq_cli.models.layers import Inventory, LeftTensor, LinearLayer

if TYPE_CHECKING:
    from torch import Tensor

TIED = "tied to another tensor"
ASSEMBLED = "put together from several tensors when the model is loaded"
NOT_IN_MODEL = "not a parameter of the model class"
SKIPPED_BY_NAME = "its name ends like that of a module which transformers leaves in 16 bits"

# The names PEFT and transformers give to the head of a model without output embeddings.
_HEADS = ("score", "classifier", "qa_outputs", "cls")


class Architecture:
    """A model class on the meta device and what follows from it."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.model = model
        self.class_name = type(model).__name__
        self.auto_class = auto_class(model)
        self.own_code = has_own_code(model)
        self.task_type = task_type(self.auto_class, model)
        self._state: dict[str, Tensor] = model.state_dict()
        self._linear = _linear_modules(model)
        self._heads = _head_modules(model)
        self._tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
        self._kept_in_float32 = sorted(model._keep_in_fp32_modules or ())
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def inventory(self, tensors: Iterable[TensorInfo]) -> Inventory:
        """Every tensor of the checkpoint, with the module that it becomes."""
        infos = {info.name: info for info in tensors}
        entries = tuple(self._entry(info) for info in infos.values())
        return self._drop_unloadable(Inventory(entries), infos)

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
        found: set[str] = set()
        unused: list[str] = []
        several = False
        for info in tensors:
            parameter, assembled = self._parameter(info.name)
            several |= assembled
            if parameter not in self._state:
                if not _matches_any(info.name, self.model._keys_to_ignore_on_load_unexpected):
                    unused.append(info.name)
                continue
            found.add(parameter)
            shape = tuple(self._state[parameter].shape)
            if not assembled and info.shape != shape:
                raise CorruptCheckpoint(
                    f"config.json and the weights contradict each other at {info.name}",
                    cause=f"{self.class_name} has {shape} there, the file {info.shape}",
                    hint="the config may belong to another checkpoint: download both again",
                )
        needed = {name for name, _ in self.model.named_parameters()} - found - self._tied
        missing = sorted(
            name
            for name in needed
            if not _matches_any(name, self.model._keys_to_ignore_on_load_missing)
        )
        # One tensor that becomes several parameters is known by the first of them only.
        split = several and any(len(rule.target_patterns) > 1 for rule in self._converters)
        if missing and not split:
            raise CorruptCheckpoint(
                f"no file has the weights of {missing[0]} ({len(missing)} such parameters)",
                cause=f"config.json describes a {self.class_name} that has them",
                hint="the config may belong to another checkpoint: download both again",
            )
        return unused

    def trained_heads(self, tensors: Iterable[str]) -> dict[str, str]:
        """Tensors that PEFT expects in the adapter too, each with its parameter's name.

        For these tasks PEFT trains the head beside the adapter (`modules_to_save`) and refuses
        an adapter without it.
        """
        if self.task_type not in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
            return {}
        return {
            tensor: parameter
            for tensor, parameter in self.parameters_of(tensors).items()
            if parameter.partition(".")[0] in self._heads
        }

    def parameters_of(self, tensors: Iterable[str]) -> dict[str, str]:
        """The parameter that each of these tensors of a checkpoint becomes."""
        return {tensor: self._parameter(tensor)[0] for tensor in tensors}

    def replaced_modules(self, skipped: Sequence[str]) -> set[str]:
        """Paths of the linear modules that transformers quantizes, given a skip list."""
        kept = [*skipped, *self._kept_in_float32]
        return {name for name in self._linear if not _matches(name, kept)}

    def skip_modules(self, quantized: Sequence[LinearLayer]) -> list[str]:
        """Paths of all linear modules that must stay as they are, for `llm_int8_skip_modules`.

        transformers takes an explicit list verbatim, so it has to be complete: a module missing
        from it would be replaced by a 4-bit layer that has no codes to load.
        """
        return sorted(set(self._linear) - {layer.module for layer in quantized})

    def _parameter(self, tensor: str) -> tuple[str, bool]:
        """The parameter that ``tensor`` becomes, by transformers' own renaming rules.

        Returns:
            its name, and whether other tensors are merged into it.
        """
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        name, source = rename_source_key(
            tensor, self._renamings, self._converters, prefix, self._state
        )
        if name not in self._state and tensor in self._state:
            name, source = rename_source_key(tensor, [], [], prefix, self._state)
        return name, source is not None

    def _entry(self, info: TensorInfo) -> LinearLayer | LeftTensor:
        parameter, assembled = self._parameter(info.name)
        module = parameter.removesuffix(".weight")
        transposed = type(self._linear.get(module)).__name__ == "Conv1D"
        return layers.entry(
            info, module, transposed, self._reason_to_leave(info, parameter, assembled)
        )

    def _reason_to_leave(self, info: TensorInfo, parameter: str, assembled: bool) -> str | None:
        from torch import nn

        if info.dtype not in DTYPE_NAMES:
            return layers.NOT_FLOATING_POINT
        if parameter not in self._state:
            return NOT_IN_MODEL
        if ".experts" in parameter and self._state[parameter].ndim == 3:
            return layers.STACKED_EXPERTS
        if assembled:
            return ASSEMBLED
        if len(info.shape) != 2 or 0 in info.shape:
            return layers.NOT_A_MATRIX
        module = parameter.removesuffix(".weight")
        owner = self.model.get_submodule(parameter.rpartition(".")[0])
        kind = type(owner).__name__
        if "Embedding" in kind:
            return layers.EMBEDDING
        if any(f"{module}.".startswith(f"{head}.") for head in self._heads):
            return layers.OUTPUT_HEAD
        if parameter in self._tied:
            return TIED
        if module in self._linear and parameter != module:
            fp32 = _matches(module, self._kept_in_float32)
            return layers.KEPT_IN_FLOAT32 if fp32 else None
        if "Router" in kind or "Gate" in kind:
            return layers.ROUTER
        return (
            layers.SUBCLASSED_LINEAR if isinstance(owner, nn.Linear) else f"a parameter of {kind}"
        )

    def _drop_unloadable(self, inventory: Inventory, infos: dict[str, TensorInfo]) -> Inventory:
        """Leaves layers that the skip list would hit by accident.

        transformers skips a module if an entry is the *end* of its name: with a head called
        `classifier` in the list, no layer called `…classifier` could be loaded.
        """
        skipped = self.skip_modules(inventory.layers)
        hit = {layer for layer in inventory.layers if _matches(layer.module, skipped)}
        if not hit:
            return inventory
        entries = tuple(
            layers.leave(infos[entry.tensor], SKIPPED_BY_NAME) if entry in hit else entry
            for entry in inventory.entries
        )
        # What is left now joins the skip list, and may hit others in turn.
        return self._drop_unloadable(Inventory(entries), infos)


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
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    known = config.get("model_type") in CONFIG_MAPPING_NAMES
    if "auto_map" in config and not trust_remote_code and not known:
        raise UnsafeCheckpoint(
            f"model type '{config.get('model_type')}' is defined by code in the checkpoint",
            cause="that code would run on this machine",
            hint="read it, pin its revision, then add --trust-remote-code",
        )
    with told_as(CorruptCheckpoint, f"{directory / 'config.json'}: no model can be built from it"):
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
        return Architecture(model)


def _model_class(config: dict[str, Any], settings: Any) -> Any:
    """The class in ``architectures``; None where only the checkpoint's own code has it."""
    import transformers

    named = config.get("architectures") or []
    found = getattr(transformers, named[0], None) if named else None
    if found is not None or "auto_map" in config:
        return found
    for mapping in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING):
        if not named and type(settings) in mapping:
            return mapping[type(settings)]
    raise UnsupportedModel(
        f"transformers {transformers.__version__} has no class for this model",
        cause=f"config.json names {named} for model type '{settings.model_type}'",
        hint="pip install -U transformers",
    )


def _linear_modules(model: Any) -> dict[str, Any]:
    """What transformers would replace: exactly nn.Linear, and any Conv1D."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Conv1D) or type(module) is nn.Linear
    }


def _head_modules(model: Any) -> set[str]:
    """Modules that PEFT's `all-linear` leaves out: output embeddings, else the classifier."""
    output = model.get_output_embeddings()
    if output is not None:
        return {name for name, module in model.named_modules() if module is output}
    return {name for name in _HEADS if getattr(model, name, None) is not None}


def _matches(module: str, patterns: Iterable[str]) -> bool:
    from transformers.quantizers.quantizers_utils import should_convert_module

    return not should_convert_module(module, list(patterns))


def _matches_any(name: str, patterns: Iterable[str] | None) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())
