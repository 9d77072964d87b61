"""What the libraries that load a plan's output object to in it, asked on the meta device.

transformers' quantizer leaves the model as it is before weights are loaded, PEFT puts the plan's
adapter on it, and both are held against the plan. Each question changes the model that it is about,
so each is asked of a new one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.adapter import PREFIX
from loftq_cli.checkpoint.safetensors import TensorInfo
from loftq_cli.checkpoint.writer import PlannedTensor
from loftq_cli.containers.fused import expert_stack
from loftq_cli.engines.adapter_settings import adapter_settings
from loftq_cli.engines.expert_starts import adapted_stacks
from loftq_cli.engines.plan import Plan, skip_list
from loftq_cli.errors import UnsupportedModel, first_line
from loftq_cli.libraries import import_bitsandbytes
from loftq_cli.models import layers as words
from loftq_cli.models.layers import last_part

if TYPE_CHECKING:
    from loftq_cli.models.architecture import Architecture

NOT_REPLACED = "transformers' quantizer does not replace it"
NOT_ATTACHED = "PEFT attaches no adapter here"
IN_16_BITS = "--init lora writes the model in 16 bits with a new adapter"
_ADAPTER = "default"


@dataclass(frozen=True)
class Refused:
    """Modules that are not quantized (``kept``) or get no adapter (``unadapted``), and why."""

    kept: Mapping[str, str] = field(default_factory=dict)
    unadapted: Mapping[str, str] = field(default_factory=dict)

    def __or__(self, other: Refused) -> Refused:
        return Refused({**self.kept, **other.kept}, {**self.unadapted, **other.unadapted})


def objections(
    plan: Plan,
    build: Callable[[], Architecture],
    original: Architecture,
    tensors: list[TensorInfo],
) -> tuple[Refused, tuple[str, ...]]:
    """What the libraries refuse of the plan, and the heads that PEFT trains beside the adapter."""
    model = build().model
    settings = adapter_settings(plan, original, "", "")
    refused = loader_objections(plan, model, original, tensors)
    if refused.kept:
        return refused, ()
    try:
        adapted = _as_adapted(model, settings)
    except Exception as error:  # PEFT, torch and bitsandbytes have types of their own
        return _refused_kinds(plan, build, settings, error), ()
    return _held_against(plan, adapted, original)


def loader_objections(
    plan: Plan, model: Any, original: Architecture, tensors: list[TensorInfo]
) -> Refused:
    """What transformers refuses to load quantized; ``model`` is as it is before that afterwards.

    Raises:
        UnsupportedModel: it then wants other weights than there will be.
    """
    container = plan.settings.container
    # Where weights are dequantized, the model stays as it is.
    asked = container.quantizes and container.stays_packed
    if asked and not container.missing_libraries():
        return _as_quantized(plan, model, original, tensors)
    if container.quantizes:
        _require_as_it_is(plan, model, original)
    return Refused()


def _require_as_it_is(plan: Plan, model: Any, original: Architecture) -> None:
    """Refuses to keep experts that transformers takes apart, dequantized or not: Llama 4's."""
    method = plan.settings.container.name
    apart = {expert_stack(each.layer.module) for each in plan.layers if each.layer.expert}
    for name, _ in model.named_modules():
        if name not in apart and method in original.stacks.patched(f"{name}.0"):
            cause = f"its loader wants every expert of {name} as layers of its own"
            raise _unloadable(original, f"{cause}, and the files would keep them stacked")


def _as_quantized(
    plan: Plan, model: Any, original: Architecture, tensors: list[TensorInfo]
) -> Refused:
    """Changes the model as transformers does before it loads the weights."""
    from transformers.quantizers.auto import AutoHfQuantizer

    import_bitsandbytes()
    container = plan.settings.container
    config = container.quantization_config(
        [each.weight for each in plan.layers], skip_list(plan, original), None
    )
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"}, checkpoint_files=None)
    # Most experts are none of its layers: it holds them as one, and other libraries load them.
    held = {name for name, _ in model.named_modules()}
    modules = {each.layer.module: each.layer for each in plan.layers}
    planned = {name for name, layer in modules.items() if not layer.expert or name in held}
    replaced = {name for name, module in model.named_modules() if container.holds(module)}
    if refused := sorted(planned - replaced):
        return Refused(kept=dict.fromkeys(refused, NOT_REPLACED))
    if beyond := sorted(replaced - planned):
        cause = f"its loader makes quantized layers of {_some(beyond)}, without codes to load"
        raise _unloadable(original, cause)
    quantized = type(original)(model)
    written, became = _as_written(plan, tensors, planned)
    wanted = original.placed(tensors).keys() - became.keys()
    wanted |= {name for names in became.values() for name in names}
    if lost := sorted(wanted - quantized.placed(written).keys()):
        raise _unloadable(original, f"it has no place for {_some(lost)} then")
    if missing := sorted({*quantized.unfilled(written)} - {*original.unfilled(tensors)}):
        raise _unloadable(original, f"it wants {_some(missing)} then, which no tensor becomes")
    return Refused()


def _as_written(
    plan: Plan, tensors: list[TensorInfo], modules: Collection[str]
) -> tuple[list[TensorInfo], dict[str, list[str]]]:
    """The tensors that there will be, and which ones those become that are not there any more.

    Only of these ``modules`` there will be others.
    """
    became: dict[str, list[str]] = {}
    parts: list[PlannedTensor] = []
    for planned in (each for each in plan.layers if each.layer.module in modules):
        stored = plan.settings.container.planned(planned.weight)
        names = [part.name for part in stored]
        name = planned.tensor if planned.tensor in names else names[0]
        if name != planned.layer.source:
            became.setdefault(planned.layer.source, []).append(name)
            parts += stored
    return [
        *(each for each in tensors if each.name not in became),
        *(TensorInfo(part.name, part.dtype, part.shape, 0, part.nbytes) for part in parts),
    ], became


def _as_adapted(model: Any, settings: Mapping[str, Any]) -> Any:
    """PEFT's model for an adapter's config; its warnings are about what is looked at here."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**{key: value for key, value in settings.items() if key != "peft_type"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config, adapter_name=_ADAPTER, low_cpu_mem_usage=True)


def _held_against(
    plan: Plan, adapted: Any, original: Architecture
) -> tuple[Refused, tuple[str, ...]]:
    """Where PEFT put adapters and where their tensors went, against the plan."""
    import torch
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    planned = {each.layer.module for each in plan.layers if each.adapted}
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    heads = _trained_heads(state)
    if in_head := _in_heads(plan, heads):
        return Refused(kept=in_head), ()
    dtype = plan.settings.adapter_dtype
    stacks = [
        tensor
        for place in adapted_stacks(plan, original)
        for tensor in place.stack.planned(place.module, dtype)
    ]
    attached = {_module(name) for name in state if ".lora_" in name}
    if any(each.name in state and state[each.name].shape != each.shape for each in stacks):
        raise UnsupportedModel(
            "PEFT has A and B of experts in another layout",
            cause="before 0.20 it has them the other way round",
            hint="pip install -U peft, or leave experts out of --target-modules",
        )
    # As it is loaded: PEFT may give the tensors other names first.
    tensors = {
        **{name: tensor for name, tensor in state.items() if ".lora_" not in name},
        **{
            each.name: torch.empty(each.shape, device="meta")
            for each in [*plan.adapter_tensors(plan.layers), *stacks]
        },
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = set_peft_model_state_dict(
            adapted, tensors, adapter_name=_ADAPTER, low_cpu_mem_usage=True
        )
    unplaced = {_module(name) for name in loaded.unexpected_keys}
    on_experts = {_module(each.name) for each in stacks}
    if on_experts - attached or on_experts & unplaced:
        raise UnsupportedModel(
            "PEFT puts no adapter on experts of this model",
            cause=f"there is none at {min(on_experts - attached or on_experts & unplaced)}",
            hint="leave experts out of --target-modules",
        )
    beyond = attached - planned - on_experts
    lost = planned - attached | planned & unplaced
    if beyond and not lost:
        raise UnsupportedModel(
            "PEFT puts adapters where none were computed",
            cause=f"on {min(beyond)}, whichever way the targets are spelled",
            hint="choose other --target-modules",
        )
    return Refused(
        unadapted=dict.fromkeys(sorted(lost), words.MOVED if beyond else NOT_ATTACHED)
    ), heads


def _module(name: str) -> str:
    """The layer that a tensor of an adapter is of."""
    return name.partition(".lora_")[0].removeprefix(PREFIX)


def _trained_heads(state: Iterable[str]) -> tuple[str, ...]:
    """The parameters that PEFT keeps with an adapter, and are none of its own."""
    return tuple(sorted(name.removeprefix(PREFIX) for name in state if ".lora_" not in name))


def _in_heads(plan: Plan, heads: Iterable[str]) -> dict[str, str]:
    """The plan's layers that PEFT trains as they are, with the reason to keep them so."""
    modules = {head.rpartition(".")[0] for head in heads}
    planned = [each.layer.module for each in plan.layers]
    return {module: words.OUTPUT_HEAD for module in planned if module in modules}


def _refused_kinds(
    plan: Plan,
    build: Callable[[], Architecture],
    settings: Mapping[str, Any],
    error: Exception,
) -> Refused:
    """Of the layers' kinds, by the ends of their names, those that PEFT will not take at all.

    Where that is because they are of a head that it trains whole, they are to be kept so.

    Raises:
        UnsupportedModel: it takes each of them, and not all.
    """
    from peft import get_peft_model_state_dict

    refused: dict[str, str] = {}
    adapted = [planned.layer.module for planned in plan.layers if planned.adapted]
    for kind in sorted({last_part(module) for module in adapted}):
        modules = [module for module in adapted if last_part(module) == kind]
        try:
            adapted_ones = _as_adapted(build().model, {**settings, "target_modules": modules})
        except Exception as one:
            refused |= dict.fromkeys(modules, f"PEFT refuses it: {first_line(one)}")
            continue
        state = get_peft_model_state_dict(adapted_ones, save_embedding_layers=False)
        if in_head := _in_heads(plan, _trained_heads(state)):
            return Refused(kept=in_head)
    if not refused:
        raise UnsupportedModel("PEFT cannot adapt this model", cause=first_line(error)) from error
    return Refused(unadapted=refused)


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} others"


def _unloadable(architecture: Architecture, cause: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"transformers could not load a quantized {architecture.class_name}",
        cause=cause,
        hint=IN_16_BITS,
    )
