"""`loftq targets`: which layers a model has, what adapting them would cost, and what is skipped."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loftq_cli.commands.run import Run, command
from loftq_cli.formats import DEFAULT_CONTAINER

if TYPE_CHECKING:
    from loftq_cli import schema
    from loftq_cli.engines.settings import Settings
    from loftq_cli.models.kinds import Kind
    from loftq_cli.models.layers import Inventory
    from loftq_cli.models.presets import Preset


@command("targets")
def targets(
    run: Run,
    model: str = "demo",
    rank: int = 16,
    container: str = DEFAULT_CONTAINER,
    preflight: bool = False,
) -> None:
    """
    \b
    loftq targets --model gpt2
    loftq targets --model gpt2 | cut -f1      (names for --target-modules)
    loftq targets --model gpt2 --rank 8 --json | jq .results.presets
    loftq targets --model org/name --container compressed-tensors

    Lists every kind of linear layer, the target presets in this model's own names with what they
    would train, and what is skipped with the reason. Only configs and headers are read, and
    well-known models need no files at all. Layers are told by their names and shapes; with
    --preflight the model class, its loader and PEFT are asked, as `loftq quantize` asks them.
    """
    from loftq_cli.engines.experts import experts_of
    from loftq_cli.engines.plan import PlannedLayer, as_asked
    from loftq_cli.engines.settings import Settings
    from loftq_cli.models import presets
    from loftq_cli.models.costs import trainable_parameters
    from loftq_cli.models.kinds import kinds, skipped_modules
    from loftq_cli.models.layers import LinearLayer
    from loftq_cli.models.lookup import find_model
    from loftq_cli.schema import LayerKind, TargetsResults

    with run.timing("resolve"):
        found = find_model(model, run.note, with_headers=preflight)
    run.resolved("model", found.identity.source, found.reason)
    outline = found.outline
    if preflight:
        from loftq_cli.engines.preflight import ask_found, outline_asked

        with run.timing("plan"):
            plan = ask_found(found, Settings(rank=1, container_name=container)).plan
        outline = outline_asked(outline, plan)
    settings = Settings(rank=1, container_name=container)
    inventory, held = _fitting(as_asked(outline.inventory, settings), settings)
    planned = [
        PlannedLayer(entry, settings.bits, 0) if isinstance(entry, LinearLayer) else entry
        for entry in inventory.entries
    ]
    experts = experts_of(planned, settings, outline.parameters)
    outline = replace(outline, inventory=inventory.adaptable())
    elements = sum(layer.parameters for layer in inventory.layers)
    # Attention before the feed-forward part, in before out, and last what has no role.
    groups = sorted(kinds(outline.layers), key=lambda kind: (not _roles(kind), _roles(kind)))
    results = TargetsResults(
        architecture=outline.architecture,
        counted_by="class" if preflight else "names",
        base_parameters=outline.parameters,
        rank=rank,
        container=container,
        bits=settings.bits,
        quantized_bytes=held,
        stored_bits=None if not elements else 8 * held / elements,
        layers=[
            LayerKind(
                name=kind.name,
                count=len(kind.layers),
                in_features=kind.in_features,
                out_features=kind.out_features,
                parameters=kind.parameters,
                share_of_parameters=kind.parameters / outline.parameters,
                trainable_parameters=trainable_parameters(kind.layers, rank),
                role=", ".join(_roles(kind)) or None,
                also_selects=list(kind.also_selects),
            )
            for kind in groups
        ],
        presets=[
            _preset(preset, rank, outline.parameters) for preset in presets.presets(outline.layers)
        ],
        skipped=skipped_modules(outline),
        experts=experts,
        guessed=[
            kind.name
            for kind in groups
            if any(presets.is_guessed(layer.module) for layer in kind.layers)
        ],
        without_role=[kind.name for kind in groups if not _roles(kind)],
    )
    run.finish(results, model=found.identity)


def _fitting(inventory: Inventory, settings: Settings) -> tuple[Inventory, int]:
    """The layers that the container takes, with the others left for its reason; and their bytes."""
    from loftq_cli.engines.plan import PlannedLayer
    from loftq_cli.models.layers import LeftTensor, LinearLayer, leave_layer

    container, held = settings.container, 0
    entries: list[LinearLayer | LeftTensor] = []
    for entry in inventory.entries:
        if isinstance(entry, LinearLayer):
            weight = PlannedLayer(entry, settings.bits, 0).weight
            if (reason := container.why_unfit(weight)) is not None:
                entries.append(leave_layer(entry, reason))
                continue
            held += sum(tensor.nbytes for tensor in container.planned(weight))
        entries.append(entry)
    return replace(inventory, entries=tuple(entries)), held


def _roles(kind: Kind) -> list[str]:
    from loftq_cli.models.presets import role_of

    return sorted({role for layer in kind.layers if (role := role_of(layer.module)) is not None})


def _preset(preset: Preset, rank: int, base: int) -> schema.TargetPreset:
    from loftq_cli.models.costs import ADAPTER_ITEM_BYTES, trainable_parameters
    from loftq_cli.schema import TargetPreset

    trainable = trainable_parameters(preset.layers, rank)
    return TargetPreset(
        name=preset.name,
        target_modules=preset.target_modules,
        modules=len(preset.layers),
        parameters=sum(layer.parameters for layer in preset.layers),
        trainable_parameters=trainable,
        trainable_percent=round(100 * trainable / (base + trainable), 4),
        adapter_bytes=ADAPTER_ITEM_BYTES * trainable,
    )
