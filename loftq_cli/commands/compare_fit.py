"""Which grids a model takes, asked before the first method of a comparison is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.commands.run import Run
from loftq_cli.engines.experts import experts_of, has_experts
from loftq_cli.engines.preflight import ask
from loftq_cli.engines.settings import Settings
from loftq_cli.errors import InvalidSetting, LoftqError, UnsupportedModel, UsageError
from loftq_cli.options import CompareOptions
from loftq_cli.report.stored_bits import called

if TYPE_CHECKING:
    from loftq_cli.checkpoint.index import Checkpoint
    from loftq_cli.models.architecture import Architecture


def possible(
    run: Run, directory: Path, architecture: Architecture, asked: CompareOptions,
    planned: Sequence[Settings],
) -> list[Settings]:  # fmt: skip
    """The methods whose grid takes this model.

    A grid that is left out is told of, with the reason.

    Raises:
        UsageError, UnsupportedModel, InvalidSetting: what one of those that stay would be refused
            for when its turn comes.
    """
    from loftq_cli.checkpoint.index import open_checkpoint
    from loftq_cli.engines.plan import make_plan

    checkpoint = open_checkpoint(directory)
    inventory = architecture.inventory(checkpoint.infos)
    if asked.experts is not None and not has_experts(make_plan(inventory, Settings(rank=1))):
        raise UsageError(f"--experts has no effect: {asked.model} has none")
    refused = dict(_refused(checkpoint, asked, planned))
    fitting = [each for each in planned if grid_named(each) not in refused]
    if any(each.container.quantizes for each in fitting):
        for grid, error in refused.items():
            run.note(f"left out: {grid}, for {error.cause or error.what}")
        planned = fitting
    elif refused:
        raise next(iter(refused.values()))
    for each in planned:
        try:
            make_plan(inventory, each)
        except InvalidSetting as error:
            if error.hint:
                error.hint = error.hint.replace("--rank ", "--ranks ")
            raise
    return list(planned)


def _refused(
    checkpoint: Checkpoint, asked: CompareOptions, planned: Sequence[Settings]
) -> Iterator[tuple[str, LoftqError]]:
    """Of several grids those that do not fit, could not be loaded, or do not what they say.

    A single one is refused by its first method in time.
    """
    from loftq_cli.models.source import read_config

    directory = checkpoint.directory
    grids = {grid_named(each): each for each in planned if each.container.quantizes}
    if len(grids) < 2:
        return
    config = read_config(directory)
    for name, settings in grids.items():
        trust = asked.trust_remote_code
        settings = replace(settings, rank=1)  # which is too large for no layer
        try:
            plan = ask(directory, config, checkpoint, settings, trust_remote_code=trust).plan
        except (InvalidSetting, UnsupportedModel) as error:
            yield name, error
            continue
        if settings.experts == "quantize":
            entries = [entry for task in plan.tasks for entry in task.entries]
            found = experts_of(entries, settings, 1)
            if found is not None and not found.quantized:
                yield name, UnsupportedModel("no expert would be quantized", cause=found.reason)


def grid_named(settings: Settings) -> str:
    """`int4 in blocks of 64 (gptq)`."""
    return called(**grid_of(settings)) if settings.container.quantizes else ""


def grid_of(settings: Settings) -> dict[str, Any]:
    """How weights lie in files: fields of `schema.ComparedMethod`, none for those in 16 bits."""
    container = settings.container
    if not container.quantizes:
        return {}
    kind = container.quant_type.rstrip("0123456789")
    return {
        "grid": f"{kind}{settings.bits}",
        "container": container.name,
        "block_size": container.block_size,
        "experts": settings.experts,
    }
