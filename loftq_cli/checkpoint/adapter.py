"""The PEFT adapter directory: adapter_config.json and the tensors beside it.

Keys are `base_model.model.<module>.lora_A.weight` (r, in) and `…lora_B.weight` (out, r), without
an adapter name; PEFT adds that when it loads them (peft.utils.save_and_load).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.writer import PlannedTensor

ADAPTER_DIRECTORY = "loftq_init"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_NAME = f"{ADAPTER_DIRECTORY}/{ADAPTER_WEIGHTS}"

# Where the adapter's config says which base it is for. Of what PEFT (0.18 to 0.21) does not know
# itself nothing else comes through a training: it drops keys of the config and metadata of the
# tensors. In this dictionary it looks for two entries, and only where there is no task type; there
# it also writes them anew when it saves, and the base is lost.
AUTO_MAPPING = "auto_mapping"
_BASE = "loftq_base"

# PEFT's model stands around the original, whose paths begin with this there.
PREFIX = "base_model.model."


def adapter_part(model_file: str) -> str:
    """Where the task that makes ``model_file`` leaves its share of the adapter for the commit."""
    return f"{ADAPTER_DIRECTORY}/part-of-{model_file}"


def lora_names(module: str) -> tuple[str, str]:
    """The names of A and B of one module."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def plan_lora(module: str, shape: tuple[int, int], rank: int, dtype: str) -> list[PlannedTensor]:
    """A and B of a module of shape (out, in); ``dtype`` is safetensors' name of theirs."""
    name_a, name_b = lora_names(module)
    out_features, in_features = shape
    return [
        PlannedTensor(name_a, dtype, (rank, in_features)),
        PlannedTensor(name_b, dtype, (out_features, rank)),
    ]


def adapter_config(
    *,
    base_model: str,
    base: str,
    auto_class: str | None,
    task_type: str | None,
    rank: int,
    lora_alpha: float,
    use_rslora: bool,
    target_modules: list[str] | str,
    rank_pattern: dict[str, int],
    alpha_pattern: dict[str, float],
    fan_in_fan_out: bool,
    target_parameters: Sequence[str] = (),
) -> dict[str, Any]:
    """What `LoraConfig` needs to put the adapter back exactly as it was computed.

    ``base`` tells the base from others (`fingerprint.base_identity`), ``auto_class`` is the class
    of transformers that opens it. The patterns hold, by whole module path, what differs from
    ``rank`` and ``lora_alpha``.

    `init_lora_weights` is true, not "loftq": PEFT would run its own LoftQ over the 4-bit weights
    again. Dropout is 0 because any dropout also drops part of the correction. `fan_in_fan_out`
    is false even for Conv1D layers, whose 4-bit replacements are stored (out, in); only where
    they are left in 16 bits it is not.
    """
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        AUTO_MAPPING: {
            "base_model_class": auto_class,
            "parent_library": "transformers",
            _BASE: base,
        },
        "r": rank,
        "lora_alpha": _plain(lora_alpha),
        "rank_pattern": rank_pattern,
        "alpha_pattern": {name: _plain(alpha) for name, alpha in alpha_pattern.items()},
        "use_rslora": use_rslora,
        "target_modules": target_modules,
        **({"target_parameters": list(target_parameters)} if target_parameters else {}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "inference_mode": False,
    }


def base_of(config: Mapping[str, Any]) -> str | None:
    """Which base an adapter's config says that it is for; None if it does not say.

    One that was begun anew does not, nor one that was trained without a task type.
    """
    mapping = config.get(AUTO_MAPPING)
    base = mapping.get(_BASE) if isinstance(mapping, Mapping) else None
    is_digest = isinstance(base, str) and re.fullmatch("[0-9a-f]{64}", base, re.ASCII)
    return base if is_digest else None


def other_base(config: Mapping[str, Any], own: Mapping[str, Any], backbone: Path) -> str | None:
    """Why an adapter with this ``config`` is not for the ``backbone``, whose start has ``own``.

    None if it is, or if one of them does not say.
    """
    base, here = base_of(config), base_of(own)
    if base is None or here is None or base == here:
        return None
    return (
        f"it was trained on another base: one of {base[:12]}…, by {AUTO_MAPPING} in its "
        f"{ADAPTER_CONFIG}, and {backbone} is {here[:12]}…: quantized from other weights, with "
        "other settings, or by another version"
    )


def _plain(alpha: float) -> float:
    """Without a point where it is whole, as people write it."""
    return int(alpha) if float(alpha).is_integer() else alpha
