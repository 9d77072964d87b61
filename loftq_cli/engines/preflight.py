"""A plan that the libraries which load its output agree with, before a weight is read.

A layer that one of them does not take stays in 16 bits or gets no adapter, with the reason; a model
that could not be loaded is refused. `objections.py` asks them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from loftq_cli.checkpoint.index import Checkpoint
from loftq_cli.engines.distilling import require_distillable
from loftq_cli.engines.objections import Refused, objections
from loftq_cli.engines.plan import NOT_A_TARGET, Plan, as_asked, make_plan
from loftq_cli.engines.settings import Settings
from loftq_cli.errors import UnsupportedModel, UsageError
from loftq_cli.models.dtypes import require_numbers, runnable
from loftq_cli.models.layers import Inventory, LeftTensor, LinearLayer, unadapted_by_names
from loftq_cli.models.lookup import FoundModel
from loftq_cli.models.outline import Outline
from loftq_cli.models.source import CONFIG_FILE

if TYPE_CHECKING:
    from loftq_cli.checkpoint.safetensors import TensorInfo
    from loftq_cli.models.architecture import Architecture


class Asked(NamedTuple):
    """A plan that the libraries agree with, the class that was asked, and ``unused`` tensors.

    ``checkpoint`` has every tensor in the dtype that it is to be read in.
    """

    plan: Plan
    checkpoint: Checkpoint
    architecture: Architecture
    unused: list[str]


def ask(
    directory: Path,
    config: dict[str, Any],
    checkpoint: Checkpoint,
    settings: Settings,
    *,
    trust_remote_code: bool,
) -> Asked:
    """Plans a run on the checkpoint, whose config.json lies in ``directory``.

    Raises:
        UnsafeCheckpoint, UnsupportedModel, CorruptCheckpoint: see `read_architecture`; and
            UnsupportedModel where what the plan writes could not be loaded.
        UnknownTargetModule, InvalidSetting: see `make_plan`.
    """
    from loftq_cli.models.architecture import read_architecture

    def build() -> Architecture:
        return read_architecture(directory, config, trust_remote_code=trust_remote_code)

    def make(refused: Refused) -> tuple[Plan, Checkpoint]:
        inventory = architecture.inventory(checkpoint.infos, refused.kept)
        read = checkpoint
        if settings.container.quantizes:
            quantized = {layer.source for layer in as_asked(inventory, settings).layers}
            read = runnable(checkpoint, architecture, quantized)
            inventory = architecture.inventory(read.infos, refused.kept)
        # What another version of PEFT would move is left out as well: it may be the one that loads.
        by_names = unadapted_by_names(inventory, str(config.get("model_type"))).unadapted
        unadapted = {**by_names, **refused.unadapted}
        return make_plan(replace(inventory, unadapted=unadapted), settings), read

    architecture = build()
    require_numbers(checkpoint, architecture)
    unused = architecture.require_weights(checkpoint.infos)
    plan, read = _settle(make, build, architecture, checkpoint.infos)
    require_distillable(plan, architecture)
    return Asked(plan, read, architecture, unused)


def ask_found(found: FoundModel, settings: Settings, *, trust_remote_code: bool = False) -> Asked:
    """The same for a model of which there is no more than config and headers at hand.

    Raises:
        UsageError: there is not even that.
    """
    if found.checkpoint is None or found.config is None:
        raise UsageError(
            f"there is no config of '{found.identity.id}' at hand to ask its class",
            cause="what is told of it comes from the shipped table",
            hint=f"hf download {found.identity.id}, and the same again; or leave --preflight out",
        )
    checkpoint = found.checkpoint.cast(settings.dtype)
    with ExitStack() as stack:
        directory = checkpoint.directory
        if not (directory / CONFIG_FILE).is_file():  # it came from the hub, and nothing was kept
            directory = Path(stack.enter_context(TemporaryDirectory()))
            (directory / CONFIG_FILE).write_text(json.dumps(found.config))
        return ask(
            directory, found.config, checkpoint, settings, trust_remote_code=trust_remote_code
        )


def outline_asked(outline: Outline, plan: Plan) -> Outline:
    """An outline that was made from names, with what the class says of each of its matrices."""
    said: dict[str, list[LinearLayer | LeftTensor]] = {left.tensor: [left] for left in plan.left}
    for planned in plan.layers:
        said.setdefault(planned.layer.source, []).append(planned.layer)

    def told(entry: LinearLayer | LeftTensor) -> list[LinearLayer | LeftTensor]:
        found = said.get(entry.tensor, [entry])
        # What names tell of an embedding that is the head as well, the class does not.
        both_left = isinstance(found[0], LeftTensor) and isinstance(entry, LeftTensor)
        return [entry] if both_left else found

    entries = tuple(each for entry in outline.inventory.entries for each in told(entry))
    unadapted = {planned.layer.module: planned.reason for planned in plan.layers if planned.reason}
    return replace(outline, inventory=Inventory(entries, unadapted))


def _settle(
    make: Callable[[Refused], tuple[Plan, Checkpoint]],
    build: Callable[[], Architecture],
    original: Architecture,
    tensors: list[TensorInfo],
) -> tuple[Plan, Checkpoint]:
    """Plans again until the libraries refuse nothing.

    What ``build`` gives is a new one each time: the libraries that are asked about it change it,
    and ``original`` is what it was before.
    """
    refused = Refused()
    while True:
        plan, checkpoint = make(refused)
        adapted = [planned for planned in plan.layers if planned.adapted]
        if not adapted:
            raise _nothing_to_adapt(plan)
        found, heads = objections(plan, build, original, tensors)
        more = refused | found
        if more == refused:
            return replace(plan, trained_heads=heads), checkpoint
        refused = more


def _nothing_to_adapt(plan: Plan) -> UnsupportedModel:
    reasons = {each.reason for each in plan.layers} - {NOT_A_TARGET}
    return UnsupportedModel(
        "no layer of this model can have an adapter",
        cause="; ".join(sorted(reasons)) or "none of the targets can",
        hint="choose others with --target-modules; `loftq targets --preflight` lists them",
    )
