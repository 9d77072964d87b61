"""A written directory as it is found when it is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from loftq_cli import hardware
from loftq_cli.checkpoint.adapter import ADAPTER_NAME
from loftq_cli.checkpoint.index import Checkpoint, open_checkpoint
from loftq_cli.checkpoint.safetensors import Header, read_header
from loftq_cli.checks.written.claims import ClaimedLayer, Claims
from loftq_cli.containers import weights_in
from loftq_cli.containers.base import Damaged, StoredWeight, Weight
from loftq_cli.errors import CheckFailed
from loftq_cli.models.architecture import Architecture, read_architecture
from loftq_cli.models.layers import STACKED_EXPERTS, LinearLayer
from loftq_cli.models.source import main_dtype, read_config
from loftq_cli.models.stacking import Stack
from loftq_cli.record import Progress

_LOADERS = ("transformers", "peft", "bitsandbytes")
WRITE_AGAIN = "copy it again from where it was written, or run `loftq quantize` again"


@dataclass
class Written:
    """The directory that is verified. What several checks share is opened when first needed."""

    directory: Path
    claims: Claims
    device: str
    dtype: str | None  # to load it in; None: its own
    progress: Progress
    trust_remote_code: bool
    made_with: Mapping[str, str] = field(default_factory=dict)  # versions, by the report
    intact: bool = False  # the files have been seen to be those of the report

    @property
    def remedy(self) -> str:
        """What to do where a library does not take the files: they are damaged, or it is another.

        The versions that wrote them took them.
        """
        here = hardware.environment()["packages"]
        others = [
            f"{name} {version} (here {here.get(name, 'none')})"
            for name in _LOADERS
            if (version := self.made_with.get(name)) and version != here.get(name)
        ]
        if not (self.intact and others):
            return WRITE_AGAIN
        return (
            f"the files are as they were written, with {', '.join(others)}: pip install -U "
            f"{' '.join(_LOADERS)}, or those versions"
        )

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_config(self.directory)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.directory)

    @cached_property
    def architecture(self) -> Architecture:
        return self.on_meta()

    @cached_property
    def plain_layers(self) -> dict[str, LinearLayer]:
        """The linear layers whose weights are stored as they were, by module."""
        inventory = self.architecture.inventory(self.checkpoint.infos)
        return {layer.module: layer for layer in inventory.layers}

    @cached_property
    def weights(self) -> dict[str, str]:
        """The weight of each module that is stored quantized, whatever the report says."""
        return self.architecture.weights_of_modules(weights_in(self.checkpoint.tensors))

    @cached_property
    def experts(self) -> set[str]:
        """Of those modules, the ones that the class holds as parts of a stack."""
        shape_of = self.architecture.expert_shape
        return {module for module, name in self.weights.items() if shape_of(name) is not None}

    def originals(self, source: Checkpoint) -> dict[str, LinearLayer]:
        """The source's layers by module; of stacks of experts those that are quantized here."""
        quantized = self.weights
        inventory = self.architecture.inventory(source.infos)

        def why_it_stays(stack: Stack) -> str | None:
            return None if stack.module(0) in quantized else STACKED_EXPERTS

        return {layer.module: layer for layer in inventory.apart(why_it_stays).layers}

    @cached_property
    def layer_tensors(self) -> set[str]:
        """The weights of the layers: all that are stored quantized, or those of the report."""
        if self.claims.container.quantizes:
            return weights_in(self.checkpoint.tensors)
        found = (self.plain_layers.get(layer.name) for layer in self.claims.layers)
        return {layer.tensor for layer in found if layer is not None}

    def on_meta(self) -> Architecture:
        """The model class anew, without memory: no adapter was ever on it."""
        return read_architecture(
            self.directory, self.config, trust_remote_code=self.trust_remote_code
        )

    @cached_property
    def adapter_header(self) -> Header | None:
        """That of the adapter's tensors; None where the report has no adapter."""
        return read_header(self.directory / ADAPTER_NAME) if self.claims.adapted else None

    def weight_of(self, layer: ClaimedLayer) -> str:
        """The tensor that holds the layer's codes."""
        try:
            return self.weights[layer.name]
        except KeyError:
            bits = self.claims.container.code_bits(layer.bits)
            raise CheckFailed(
                f"{layer.name} is not stored in {bits} bits",
                cause="the report has the layer, and no weight file has codes and scales of it",
                hint=WRITE_AGAIN,
            ) from None

    def stored(self, layer: ClaimedLayer, *, every_code: bool = False) -> StoredWeight:
        """The layer's tensors on the device, once they have been seen to fit each other.

        With ``every_code`` the codes too have been looked at, each of them.
        """
        container = self.claims.container
        # The tensors say another where they can (`Container.read`).
        dtype = main_dtype(self.config)
        weight = Weight(self.weight_of(layer), layer.name, layer.shape, layer.bits, dtype)
        try:
            stored = container.read(self.checkpoint.tensors, weight, self.device)
            if every_code:
                container.require_codes(stored)
        except Damaged as error:
            raise not_as_reported(layer, str(error)) from None
        return stored


def not_as_reported(layer: ClaimedLayer, cause: str) -> CheckFailed:
    return CheckFailed(
        f"{layer.name} is not stored as the report says", cause=cause, hint=WRITE_AGAIN
    )
