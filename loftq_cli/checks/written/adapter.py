"""The adapter directory: its config, its tensors, and what PEFT makes of the two.

PEFT is given the model class on the meta device, so that this takes no memory: the modules, shapes
and scalings are those that it will have, and the values are looked at one tensor at a time.
"""

from __future__ import annotations

import math
import os
import warnings
from pathlib import PurePath
from typing import Any

from loftq_cli import starts
from loftq_cli.checkpoint.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_DIRECTORY,
    ADAPTER_NAME,
    AUTO_MAPPING,
    PREFIX,
    adapter_config,
    base_of,
    lora_names,
)
from loftq_cli.checkpoint.index import load_json
from loftq_cli.checkpoint.safetensors import Header, read_header, shown
from loftq_cli.checkpoint.tensors import load_tensor
from loftq_cli.checks.battery import Finding
from loftq_cli.checks.written.directory import WRITE_AGAIN, Written
from loftq_cli.checks.written.passes import adapters_of
from loftq_cli.errors import CheckFailed, first_line
from loftq_cli.formats import SHORT_NAMES
from loftq_cli.report.serving import cautions

_CONFIG_NAME = f"{ADAPTER_DIRECTORY}/{ADAPTER_CONFIG}"
# What they match is seen when PEFT has used them.
_FOR_PEFT_TO_SAY = {"target_modules", "rank_pattern", "alpha_pattern"}


def adapter(written: Written) -> Finding:
    """Config against report, tensors against config, PEFT against both, and finite values."""
    if not written.claims.adapted:
        return _none(written)
    _require_config(written)
    header = read_header(written.directory / ADAPTER_NAME)
    _require_tensors(written, header)
    stacks = _require_as_peft(written, header)
    _require_finite(header)
    _require_zeros(written, header)
    claims = written.claims
    parameters = sum(info.elements for info in header.tensors.values())
    heads = len(header.tensors) - 2 * (len(claims.adapted) + stacks)
    ranks = [layer.stored_rank for layer in claims.adapted]
    rank = f"rank {ranks[0]}" if len(set(ranks)) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
    return Finding(
        f"{rank} on {len(ranks)} layers, {parameters:,} finite values; PEFT "
        "puts them on the same layers with the same scaling"
        + (f"; {stacks} parameters of experts have one too" if stacks else "")
        + (f"; {heads} tensors of the trained head" if heads else ""),
        {"layers": len(claims.adapted), "parameters": parameters, "scaling": claims.scaling},
        # Integers are there to be served.
        notes=cautions(claims.results) if claims.container.even_when_fused else [],
    )


def _none(written: Written) -> Finding:
    """Where the report has no layer with one."""
    if os.path.lexists(written.directory / ADAPTER_DIRECTORY):
        raise CheckFailed(
            f"{ADAPTER_DIRECTORY} is there, and by the report no layer has an adapter",
            cause="what loads the directory with it gets another model",
            hint=f"delete {written.directory / ADAPTER_DIRECTORY}, or write the directory again",
        )
    return Finding("there is none, as the report says", {"layers": 0, "parameters": 0})


def _require_config(written: Written) -> None:
    claims = written.claims
    on_experts = claims.results.expert_adapters
    found = load_json(written.directory / ADAPTER_DIRECTORY / ADAPTER_CONFIG)
    expected = adapter_config(
        base_model=claims.results.repository or PurePath(claims.results.output).name,
        base=base_of(found) or "",
        auto_class=claims.results.auto_class,
        task_type=claims.results.task_type,
        rank=claims.config_rank,
        lora_alpha=claims.config_alpha,
        use_rslora=claims.settings.rslora,
        target_modules=[],
        rank_pattern={},
        alpha_pattern={},
        fan_in_fan_out=_transposed(written),
        target_parameters=[] if on_experts is None else on_experts.target_parameters,
    )
    if AUTO_MAPPING not in found:  # as earlier versions wrote it
        del expected[AUTO_MAPPING]
    for key in sorted(expected.keys() - _FOR_PEFT_TO_SAY):
        if found.get(key) != expected[key]:
            refused = "; vLLM refuses any but true and false" if key == "init_lora_weights" else ""
            raise CheckFailed(
                f"{_CONFIG_NAME} is not the config of this adapter",
                cause=f"{key} is {found.get(key)!r:.80}, and by the report {expected[key]!r}"
                f"{refused}",
                hint=WRITE_AGAIN,
            )

    _require_nothing_else(found, expected)


def _require_nothing_else(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """What loftq does not write may be there with PEFT's default: some of it names code to import,
    other models, or a way to begin anew."""
    from peft import LoraConfig

    defaults = LoraConfig().to_dict()
    for key in sorted(found.keys() - expected.keys()):
        if key not in defaults or found[key] != defaults[key]:
            raise CheckFailed(
                f"{_CONFIG_NAME} is not the config of this adapter",
                cause=f"{shown(key)} is {found[key]!r:.80}, which loftq does not write",
                hint=WRITE_AGAIN,
            )


def _transposed(written: Written) -> bool:
    """Whether PEFT finds weights stored as (in, out), as it does where nothing is quantized."""
    return not written.claims.container.quantizes and any(
        layer.name in written.plain_layers and written.plain_layers[layer.name].transposed
        for layer in written.claims.adapted
    )


def _require_tensors(written: Written, header: Header) -> None:
    """A and B of each adapted layer, in the shapes that rank and layer give them."""
    dtype = SHORT_NAMES[written.claims.settings.adapter_dtype]
    for layer in written.claims.adapted:
        rank, (out_features, in_features) = layer.stored_rank, layer.shape
        shapes = ((rank, in_features), (out_features, rank))
        for name, shape in zip(lora_names(layer.name), shapes, strict=True):
            if name not in header.tensors:
                raise _damaged(layer.name, f"{ADAPTER_NAME} has no {shown(name)}")
            info = header.tensors[name]
            if (info.dtype, info.shape) != (dtype, shape):
                raise _damaged(
                    layer.name,
                    f"{shown(name)} is {info.dtype} {list(info.shape)}, and should be "
                    f"{dtype} {list(shape)}",
                )


def _require_as_peft(written: Written, header: Header) -> int:
    """What PEFT expects to find for this config, on the layers that the report names.

    Returns:
        how many parameters of experts it finds.
    """
    model = _on_meta(written)
    from peft import get_peft_model_state_dict

    adapted = {name.removeprefix(PREFIX): each for name, each in adapters_of(model).items()}
    stacks = {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if hasattr(module, "parameter_name")
    }
    on_experts = written.claims.results.expert_adapters
    experts = 0 if on_experts is None else on_experts.experts
    if sum(module.num_experts for module in stacks.values()) != experts:
        cause = f"target_parameters in {_CONFIG_NAME} choose others than the report's {experts}"
        raise _damaged("experts", cause, written.remedy)
    claimed = {layer.name for layer in written.claims.adapted}
    for name in sorted(adapted.keys() ^ claimed):
        whose = "only the report has" if name in claimed else "the report does not have"
        cause = f"target_modules in {_CONFIG_NAME} choose layers of which {whose} it"
        raise _damaged(name, cause, written.remedy)
    scaling = written.claims.scaling
    for name, module in [*adapted.items(), *stacks.items()]:
        (found,) = module.scaling.values()
        if not math.isclose(found, scaling, rel_tol=1e-6):
            cause = f"PEFT scales it by {found:.6g}, the report by {scaling:.6g}"
            raise _damaged(name, cause, written.remedy)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    held = {name: info.shape for name, info in header.tensors.items()}
    for name in sorted(wanted.keys() | held.keys()):
        if wanted.get(name) != held.get(name):
            raise CheckFailed(
                f"{ADAPTER_NAME} is not what PEFT loads",
                cause=f"{shown(name)} has shape {_shape(held.get(name))} in the file, and "
                f"{_shape(wanted.get(name))} for PEFT",
                hint=written.remedy,
            )
    return len(stacks)


def _on_meta(written: Written) -> Any:
    """PEFT's model for the adapter's config, without memory."""
    from peft import LoraConfig, get_peft_model

    directory = written.directory / ADAPTER_DIRECTORY
    model = written.on_meta().model
    try:
        with warnings.catch_warnings():
            # It says that it transposes for Conv1D, whose 4-bit replacement needs no such thing.
            warnings.simplefilter("ignore")
            config = LoraConfig.from_pretrained(str(directory))
            return get_peft_model(model, config, low_cpu_mem_usage=True)
    except Exception as error:  # of any type: PEFT has its own for some layers
        raise CheckFailed(
            f"PEFT cannot use {_CONFIG_NAME}", cause=first_line(error), hint=written.remedy
        ) from error


def _require_finite(header: Header) -> None:
    import torch

    for name, info in header.tensors.items():
        if not bool(torch.isfinite(load_tensor(header, info)).all()):
            raise _damaged(name.removeprefix(PREFIX), f"{ADAPTER_NAME} has NaN or infinity there")


def _require_zeros(written: Written, header: Header) -> None:
    """B is zero where it corrects nothing: in starts that never do, and in padding."""
    corrects = starts.of_report(written.claims.settings.init).corrects
    for layer in written.claims.adapted:
        first = layer.rank if corrects else 0
        if first == layer.stored_rank:
            continue
        name = lora_names(layer.name)[1]
        if bool(load_tensor(header, header.tensors[name])[:, first:].any()):
            raise _damaged(
                layer.name, f"{shown(name)} is not zero from column {first} on, as it should be"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


def _damaged(layer: str, cause: str, hint: str = WRITE_AGAIN) -> CheckFailed:
    return CheckFailed(f"the adapter of {layer} is not right", cause=cause, hint=hint)
