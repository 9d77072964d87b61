"""What the plan's adapter is to PEFT: the content of `adapter_config.json`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loftq_cli.checkpoint.adapter import adapter_config
from loftq_cli.engines.expert_starts import target_parameters
from loftq_cli.engines.plan import Plan, PlannedLayer

if TYPE_CHECKING:
    from loftq_cli.models.architecture import Architecture


def adapter_settings(
    plan: Plan, architecture: Architecture, base_model: str, base: str
) -> dict[str, Any]:
    """The arguments of `LoraConfig` that put the adapter back on the plan's layers.

    ``base_model`` is the name of the directory, ``base`` what is in it (`base_identity`).
    """
    settings = plan.settings
    adapted = [planned for planned in plan.layers if planned.adapted]
    # Ranks that are all the same, though another than was asked for, need no pattern.
    same = {planned.stored_rank for planned in adapted}
    rank = same.pop() if len(same) == 1 else settings.rank
    others = {
        _pattern(planned.layer.module, adapted): planned.stored_rank
        for planned in adapted
        if planned.stored_rank != rank
    }
    return adapter_config(
        base_model=base_model,
        base=base,
        auto_class=architecture.auto_class,
        task_type=architecture.task_type,
        rank=rank,
        lora_alpha=settings.alpha_of(rank),
        use_rslora=settings.use_rslora,
        target_modules=_target_modules(plan, architecture),
        rank_pattern=others,
        alpha_pattern={name: settings.alpha_of(other) for name, other in others.items()},
        fan_in_fan_out=not settings.container.quantizes
        and any(planned.layer.transposed for planned in adapted),
        target_parameters=target_parameters(plan, architecture),
    )


def _pattern(module: str, adapted: Sequence[PlannedLayer]) -> str:
    """What PEFT finds this module by, and no other that is adapted: its path where that will do.

    PEFT takes a key for a regular expression that the end of a path has to match, so the path of
    one module may be found in that of another (`layers.0.fc1` in `vision.layers.0.fc1`).
    """
    rule = re.compile(rf"(.*\.)?({module})")
    found = [each.layer.module for each in adapted if rule.fullmatch(each.layer.module)]
    return module if found == [module] else f"^{re.escape(module)}"


def _target_modules(plan: Plan, architecture: Architecture) -> list[str] | str:
    """The adapted modules, in the shortest form by which PEFT finds them and no other.

    The ends of their names, else whole paths; a path may be the end of another one, and then it
    takes a regular expression.
    """
    adapted = {planned.layer.module for planned in plan.layers if planned.adapted}
    ends = {name.rpartition(".")[2] for name in adapted}
    others = [name for name in architecture.module_names if name not in adapted]
    # Readers may hold each expert as a layer: others than transformers 5, or that for some classes.
    container = plan.settings.container
    by_others = plan.settings.experts == "quantize" and container.why_experts_stay is not None
    experts = [planned.layer.module for planned in plan.layers if planned.layer.expert]
    patched = architecture.stacks.patched
    others += [name for name in experts if by_others or container.name in patched(name)]
    for names in (ends, adapted):
        tails = tuple(f".{name}" for name in names)
        if not any(other in names or other.endswith(tails) for other in others):
            return sorted(names)
    return "|".join(map(re.escape, sorted(adapted)))
