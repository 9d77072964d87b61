"""What a `merge --requantize` run will write: pure data, made from the plan of a merge."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from loftq_cli.checkpoint.index import Checkpoint
from loftq_cli.checkpoint.safetensors import TensorInfo
from loftq_cli.checkpoint.writer import PlannedTensor
from loftq_cli.containers import kind_of
from loftq_cli.containers.base import Container, Weight
from loftq_cli.engines.merge_plan import MergePlan
from loftq_cli.engines.objections import loader_objections
from loftq_cli.engines.plan import Plan, PlannedLayer, Task, why_expert_stays
from loftq_cli.engines.settings import Settings, settings_of
from loftq_cli.errors import UnsupportedModel, UsageError
from loftq_cli.models.architecture import read_architecture
from loftq_cli.models.layers import LeftTensor, LinearLayer
from loftq_cli.options import QuantizeOptions

MERGED = "its adapter is merged into the weight"


@dataclass(frozen=True)
class Asked:
    """The container to write, and its format; None: as the directory has it."""

    container: str | None = None
    bits: int | None = None
    block_size: int | None = None


@dataclass(frozen=True)
class RequantizePlan:
    """A merge, and the layers that its weights become, by module."""

    merge: MergePlan
    settings: Settings
    layers: Mapping[str, PlannedLayer]

    @property
    def container(self) -> Container:
        return self.settings.container

    def planned(self, weight: Weight) -> list[PlannedTensor]:
        """The tensors that a weight becomes."""
        return self.container.planned(self.layers[weight.module].weight)

    @cached_property
    def as_written(self) -> Plan:
        """The same as `quantize` would plan it, had it the merged model."""
        reasons = {each.name: each.reason for each in self.merge.written.report.results.untouched}
        tasks = [
            Task(
                name,
                tuple(
                    self.layers[entry.module]
                    if isinstance(entry, Weight)
                    else LeftTensor(
                        entry.name, entry.shape, entry.dtype, entry.nbytes, reasons[entry.name]
                    )
                    for entry in file.entries
                ),
            )
            for name, file in self.merge.written.files.items()
        ]
        return Plan(self.settings, tuple(tasks))

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The tensors that the merged model has; those of its layers are in no file."""
        tensors = {}
        for file in self.merge.written.files.values():
            for entry in file.entries:
                info = _merged(self.merge, entry) if isinstance(entry, Weight) else entry
                tensors[info.name] = (file.header, info)
        return Checkpoint(self.merge.written.source, {}, tensors)

    def made_from(self) -> dict[str, Any]:
        """What decides the bytes of the result."""
        bits = {module: each.bits for module, each in self.layers.items()}
        return {**self.merge.made_from(), "settings": self.settings.as_dict(), "bits": bits}


def plan_requantize(
    merge: MergePlan, asked: Asked, *, trust_remote_code: bool = False
) -> RequantizePlan:
    """Decides what every layer becomes; no weight is read.

    Raises:
        UsageError: the directory is not quantized, or there is no such format.
        InvalidSetting: a layer does not fit into it.
        UnsupportedModel: what loads the container does not take a layer.
    """
    settings = _settings(merge, asked)
    container = settings.container
    layers = {}
    stacks = merge.architecture.stacks
    for weight in merge.written.weights:
        bits = weight.bits if asked.bits is None else asked.bits
        if bits not in container.widths:
            raise UsageError(
                f"{weight.module} has {bits} bits, which {container.name} has not",
                hint=f"--bits {max(container.widths)}",
            )
        layer = LinearLayer(
            weight.module,
            weight.name,
            *weight.shape,
            weight.transposed,
            _dtype(merge, weight),
            stacks.expert_shape(weight.name) is not None,
        )
        if layer.expert and (reason := why_expert_stays(weight.name, stacks, settings)) is not None:
            raise UnsupportedModel(
                f"{weight.module} cannot be written in {container.name}",
                cause=f"it is {reason}",
                hint="merge without --requantize, and give the result to loftq quantize --model",
            )
        layers[weight.module] = PlannedLayer(layer, bits, 0, reason=MERGED)
    container.require_fit([each.weight for each in layers.values()])
    plan = RequantizePlan(merge, settings, layers)
    if type(container) is not type(merge.written.container):
        _require_loadable(plan, trust_remote_code)
    return plan


def _settings(merge: MergePlan, asked: Asked) -> Settings:
    """The settings of the output: those of the directory, where they are not asked for."""
    written = merge.written
    before, reported = written.container, written.report.results.settings
    if not before.quantizes:
        raise UsageError(
            f"{written.source} is not quantized: there is no container to write it in again",
            hint="merge without --requantize, and give the result to loftq quantize --model",
        )
    name, bits = asked.container or reported.container, asked.bits or reported.bits
    given: dict[str, Any] = {}
    with suppress(KeyError):  # settings_of says that there is none
        if kind_of(name, bits) is type(before):
            given = {option: getattr(before, option) for option in before.options}
    if asked.block_size is not None:
        given["block_size"] = asked.block_size
    settings = settings_of(
        QuantizeOptions(
            container=name, bits=bits, dtype=merge.dtype or reported.dtype or "auto", **given
        )
    )
    if asked.bits is None:  # then they differ as they did
        settings = replace(settings, leading=reported.leading, target_bits=reported.target_bits)
    if settings.container_name == reported.container:
        settings = replace(settings, experts=reported.experts)
    return settings


def _dtype(merge: MergePlan, weight: Weight) -> str:
    (planned,) = merge.plain(weight)
    return planned.dtype


def _merged(merge: MergePlan, weight: Weight) -> TensorInfo:
    """A weight as the merged model has it."""
    (planned,) = merge.plain(weight)
    return TensorInfo(planned.name, planned.dtype, planned.shape, 0, planned.nbytes)


def _require_loadable(plan: RequantizePlan, trust_remote_code: bool) -> None:
    """Asks what loads another container than the directory's, as `quantize` does."""
    written, architecture = plan.merge.written, plan.merge.architecture
    model = read_architecture(
        written.source, written.config, trust_remote_code=trust_remote_code
    ).model
    infos = plan.checkpoint.infos
    refused = loader_objections(plan.as_written, model, architecture, infos).kept
    if refused:
        module, reason = next(iter(refused.items()))
        raise UnsupportedModel(
            f"{module} cannot be written in {plan.container.name}",
            cause=f"{reason} ({len(refused)} such layers)",
            hint="merge without --requantize, and give the result to loftq quantize --model",
        )
