"""What the model class itself says about a checkpoint: the authority on every tensor.

The class is built on torch's meta device (shapes, no memory), and transformers' own renaming
rules say which parameter each tensor of the checkpoint becomes. So what `quantize` writes and
what `from_pretrained` replaces by 4-bit layers cannot drift apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.safetensors import TensorInfo
from loftq_cli.errors import CorruptCheckpoint, UnsafeCheckpoint, UnsupportedModel, told_as
from loftq_cli.formats import DTYPE_NAMES, FLOATS
from loftq_cli.models import layers
from loftq_cli.models.auto_classes import auto_class, has_own_code, task_type
from loftq_cli.models.layers import Inventory, LeftTensor, LinearLayer
from loftq_cli.models.raw_weights import read_directly
from loftq_cli.models.stacking import ModelStacks

if TYPE_CHECKING:
    from torch import Tensor

TIED = "tied to another tensor"
ASSEMBLED = "put together from several tensors when the model is loaded"
NOT_IN_MODEL = "not a parameter of the model class"
SKIPPED_BY_NAME = "its name ends like that of a module which transformers leaves in 16 bits"

# Heads of classes without output embeddings.
_HEADS = (*layers.HEADS, "cls", "lm_head")
# Other classes than that of the checkpoint may open a directory. What they make anew, heads and
# what stands before them, has no codes to load.
_MADE_ANEW = (
    *_HEADS, "answer_class", "discriminator_predictions", "end_logits", "generator_lm_head",
    "generator_predictions", "head", "lm_loss", "lm_predictions", "mlm_score", "pooler",
    "pooler.dense", "predictions", "projection_head", "projector", "seq_relationship",
    "sequence_summary", "start_logits", "vocab_projector", "vocab_transform",
)  # fmt: skip


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
        self._parameters: dict[str, tuple[str, str | None]] = {}
        self._linear = _linear_modules(model)
        self._heads = _head_modules(model)
        self._read_directly = read_directly(model, self._linear)
        self._tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
        self._kept_in_float32 = sorted(model._keep_in_fp32_modules or ())
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.stacks = ModelStacks(model, self._state, self._converters, self._parameter)

    def inventory(
        self, tensors: Iterable[TensorInfo], kept: Mapping[str, str] | None = None
    ) -> Inventory:
        """Every tensor of the checkpoint, with the module that it becomes.

        Modules in ``kept`` stay as they are, for the reason that it has.
        """
        infos = {info.name: info for info in tensors}
        entries = tuple(self._entry(info, kept or {}) for info in infos.values())
        return self._drop_unloadable(Inventory(entries).evened(), infos)

    @property
    def module_names(self) -> list[str]:
        """Paths of all modules, which is where PEFT looks for those to put an adapter on."""
        return [name for name, _ in self.model.named_modules() if name]

    def require_weights(self, tensors: Iterable[TensorInfo]) -> list[str]:
        """Holds the checkpoint against the class: every parameter is there, in its shape.

        transformers would fill a gap with random numbers and go on.

        Returns:
            the tensors that nothing in the class uses.

        Raises:
            CorruptCheckpoint: a parameter has no tensor, or one of another shape.
        """
        tensors = list(tensors)
        unused: list[str] = []
        for info in tensors:
            parameter, assembled = self._parameter(info.name)
            if parameter not in self._state:
                if not _matches_any(info.name, self.model._keys_to_ignore_on_load_unexpected):
                    unused.append(info.name)
                continue
            shape = tuple(self._state[parameter].shape)
            if not assembled and info.shape != shape:
                raise CorruptCheckpoint(
                    f"config.json and the weights contradict each other at {info.name}",
                    cause=f"{self.class_name} has {shape} there, the file {info.shape}",
                    hint="the config may belong to another checkpoint: download both again",
                )
        if missing := self.unfilled(tensors):
            raise CorruptCheckpoint(
                f"no file has the weights of {missing[0]} ({len(missing)} such parameters)",
                cause=f"config.json describes a {self.class_name} that has them",
                hint="the config may belong to another checkpoint: download both again",
            )
        return unused

    def unfilled(self, tensors: Iterable[TensorInfo]) -> list[str]:
        """Parameters that none of the tensors becomes, and that transformers would make up."""
        found: set[str] = set()
        several = False
        for info in tensors:
            parameter, assembled = self._parameter(info.name)
            several |= assembled is not None
            found.add(parameter)
        # One tensor that becomes several parameters is known by the first of them only.
        if several and any(len(rule.target_patterns) > 1 for rule in self._converters):
            return []
        ignored = self.model._keys_to_ignore_on_load_missing
        needed = {name for name, _ in self.model.named_parameters()} - found - self._tied
        return sorted(name for name in needed if not _matches_any(name, ignored))

    def parameters_of(self, tensors: Iterable[str]) -> dict[str, str]:
        """The parameter that each of these tensors of a checkpoint becomes."""
        return {tensor: self._parameter(tensor)[0] for tensor in tensors}

    def weights_of_modules(self, weights: Iterable[str]) -> dict[str, str]:
        """By module, these weights (`X.weight`) of a checkpoint; an expert's by its name in it."""
        return {self._module(tensor): tensor for tensor in sorted(weights)}

    def placed(self, tensors: Iterable[TensorInfo]) -> dict[str, str]:
        """The tensors of a checkpoint that the class has a place for, each with its parameter."""
        found = self.parameters_of(info.name for info in tensors)
        return {tensor: name for tensor, name in found.items() if name in self._state}

    def float_parameters(self, tensors: Iterable[str]) -> dict[str, str]:
        """The tensors of a checkpoint that numbers of the model are made of, with its names."""
        parameters = {
            name for name, each in self.model.named_parameters() if each.is_floating_point()
        }
        found = self.parameters_of(tensors)
        return {tensor: name for tensor, name in found.items() if name in parameters}

    def is_tied(self, parameter: str) -> bool:
        """Whether it shares its memory with another one."""
        return parameter in self._tied

    def linear_shape(self, module: str) -> tuple[tuple[int, int] | None, bool]:
        """(out, in) of a linear module and whether it holds them as (in, out); None: it is none."""
        found = self._linear.get(module)
        if found is None:
            return None, False
        shape, transposed = tuple(found.weight.shape), type(found).__name__ == "Conv1D"
        return (shape[::-1] if transposed else shape), transposed

    def expert_shape(self, tensor: str) -> tuple[int, int] | None:
        """(out, in) of an expert's matrix in the files; None: the tensor is none."""
        return self.stacks.expert_shape(tensor)

    def keeps_in_float32(self, parameter: str) -> bool:
        """Whether transformers keeps it in float32 when it casts a model."""
        names = {*self._kept_in_float32, *(self.model._keep_in_fp32_modules_strict or ())}
        return any(re.search(rf"(^|\.){name}($|\.)", parameter) for name in names)

    def replaced_modules(self, skipped: Sequence[str], *, whole_paths: bool = False) -> set[str]:
        """Paths of the linear modules that are quantized on loading, given a skip list.

        With ``whole_paths`` the list's reader wants those; else it is transformers itself, which
        takes a part of a path as well.
        """
        if whole_paths:
            return set(self._linear) - set(skipped)
        kept = [*skipped, *self._kept_in_float32]
        return {name for name in self._linear if not _matches(name, kept)}

    def skip_modules(self, quantized: Iterable[str]) -> list[str]:
        """Paths of all linear modules that must stay as they are, for `llm_int8_skip_modules`.

        transformers takes an explicit list verbatim, so it has to be complete: a module missing
        from it would be replaced by a 4-bit layer that has no codes to load. Other classes open the
        directory too: without this one's head there is no prefix before a path, and a fresh head
        has a name of its own. Such names are added where they hit none of the ``quantized``.
        """
        prefix = f"{self.model.base_model_prefix}."
        quantized = set(quantized)
        skipped = set(self._linear) - quantized
        others = {name.removeprefix(prefix) for name in skipped} | set(_MADE_ANEW)
        paths = {path for name in quantized for path in (name, name.removeprefix(prefix))}
        return sorted(
            skipped | {name for name in others if not any(_matches(path, [name]) for path in paths)}
        )

    def _module(self, tensor: str) -> str:
        """The module that a weight is of: an expert has none but its name in the files."""
        expert = self.expert_shape(tensor) is not None
        return (tensor if expert else self._parameter(tensor)[0]).removesuffix(".weight")

    def _parameter(self, tensor: str) -> tuple[str, str | None]:
        """The parameter that ``tensor`` becomes, by transformers' own renaming rules.

        Returns:
            its name, and the pattern of the rule that merges other tensors into it, if one does.
        """
        if tensor not in self._parameters:
            self._parameters[tensor] = self._renamed(tensor)
        return self._parameters[tensor]

    def _renamed(self, tensor: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        name, source = rename_source_key(
            tensor, self._renamings, self._converters, prefix, self._state
        )
        if name not in self._state and tensor in self._state:
            name, source = rename_source_key(tensor, [], [], prefix, self._state)
        return name, source

    def _entry(self, info: TensorInfo, kept: Mapping[str, str]) -> LinearLayer | LeftTensor:
        parameter, assembled = self._parameter(info.name)
        module = self._module(info.name)
        transposed = type(self._linear.get(module)).__name__ == "Conv1D"
        expert = self.expert_shape(info.name) is not None
        reason = self._reason_to_leave(info, parameter, assembled) or kept.get(module)
        if reason == layers.STACKED_EXPERTS and info.dtype in DTYPE_NAMES:
            return replace(layers.leave(info, reason), stack=self.stacks.stack_of(info))
        return layers.entry(info, module, transposed, reason, expert=expert)

    def _reason_to_leave(
        self, info: TensorInfo, parameter: str, assembled: str | None
    ) -> str | None:
        from torch import nn

        if info.dtype not in FLOATS:
            return layers.NOT_FLOATING_POINT
        if parameter not in self._state:
            return NOT_IN_MODEL
        if (shape := self.expert_shape(info.name)) is not None and shape == info.shape:
            return None
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
            if _matches(module, self._kept_in_float32):
                return layers.KEPT_IN_FLOAT32
            return layers.READ_DIRECTLY if module in self._read_directly else None
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
        skipped = sorted(set(self._linear) - {layer.module for layer in inventory.layers})
        named = [layer for layer in inventory.layers if not layer.expert]
        hit = {layer for layer in named if _matches(layer.module, skipped)}
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
    if not _is_model_class(found):
        found = None
    if found is not None or "auto_map" in config:
        return found
    for mapping in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING):
        if not named and type(settings) in mapping:
            return mapping[type(settings)]
    raise UnsupportedModel(
        f"transformers {transformers.__version__} has no class for this model",
        cause=f"config.json names {named} for model type '{settings.model_type}'",
        hint="name the class that the weights belong to in config.json's architectures, or "
        "pip install -U transformers",
    )


def _is_model_class(found: Any) -> bool:
    """A model that can be run: no other thing of this name, and no base class of such models."""
    import torch
    import transformers

    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        return False
    return getattr(found, "forward", None) is not torch.nn.Module.forward


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
    """Modules that are never quantized: output embeddings, else what is called a head."""
    output = model.get_output_embeddings()
    if output is not None:
        return {name for name, module in model.named_modules() if module is output}
    return {name for name in _HEADS if getattr(model, name, None) is not None}


def _matches(module: str, patterns: Iterable[str]) -> bool:
    from transformers.quantizers.quantizers_utils import should_convert_module

    return not should_convert_module(module, list(patterns))


def _matches_any(name: str, patterns: Iterable[str] | None) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())
