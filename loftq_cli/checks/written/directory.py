"""A written directory: what its report claims, and what is found when it is opened.

A report may come from a stranger with the rest of the directory. Nothing in it is believed, and
nothing outside the directory is opened on its word but the source that it names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.index import Checkpoint, open_checkpoint
from loftq_cli.containers import weights_in
from loftq_cli.containers.base import Container
from loftq_cli.errors import CheckFailed
from loftq_cli.models.architecture import Architecture, read_architecture
from loftq_cli.models.layers import LinearLayer
from loftq_cli.models.source import read_config
from loftq_cli.record import Progress

WRITE_AGAIN = "copy it again from where it was written, or run `loftq quantize` again"


@dataclass(frozen=True)
class ClaimedLayer:
    """A linear layer by the report. ``error`` is ‖W − Q − s·B·A‖ / ‖W‖, or null.

    ``bits`` is what a code tells, ``rank`` that of the correction; A and B are padded to
    ``stored_rank``. Without an adapter both are 0.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    rank: int
    stored_rank: int
    error: float | None

    @property
    def adapted(self) -> bool:
        return self.stored_rank > 0


@dataclass(frozen=True)
class ClaimedFile:
    name: str
    bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Claims:
    """What the report says was written, from what, and how."""

    source: str  # the model's name, for messages
    container: Container
    rank: int  # that was asked for; with lora_alpha it says the scaling of all layers
    lora_alpha: float
    use_rslora: bool
    corrects: bool  # else B is zero everywhere
    task_type: str | None
    auto_class: str  # the transformers class that the README loads it with
    weight_error: float | None  # of all layers taken as one
    dtype: str | None  # that everything was cast to before; None: as the source has it
    calibrated: bool  # so it speaks of outputs too, on a text that is not at hand
    layers: Sequence[ClaimedLayer]
    files: Sequence[ClaimedFile]
    source_files: frozenset[tuple[str, int, str]]  # name, bytes, hash of the header

    @property
    def scaling(self) -> float:
        """s in W ≈ Q + s·B·A."""
        return self.lora_alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    @property
    def quantized(self) -> list[ClaimedLayer]:
        return list(self.layers) if self.container.quantizes else []

    @property
    def config_rank(self) -> int:
        """The rank that the adapter's config names; its pattern has those that differ from it."""
        ranks = {layer.stored_rank for layer in self.adapted}
        return ranks.pop() if len(ranks) == 1 else self.rank

    @property
    def config_alpha(self) -> float:
        """The lora_alpha that gives ``config_rank`` the scaling that all layers have."""
        rank = self.config_rank
        if rank == self.rank:
            return self.lora_alpha
        return self.scaling * (rank**0.5 if self.use_rslora else rank)

    @property
    def adapted(self) -> list[ClaimedLayer]:
        return [layer for layer in self.layers if layer.adapted]


@dataclass
class Written:
    """The directory that is verified. What several checks share is opened when first needed."""

    directory: Path
    claims: Claims
    device: str
    dtype: str | None  # to load it in; None: its own
    progress: Progress
    trust_remote_code: bool

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
        coded = weights_in(self.checkpoint.tensors)
        parameters = self.architecture.parameters_of(sorted(coded))
        return {parameters[tensor].removesuffix(".weight"): tensor for tensor in sorted(coded)}

    def on_meta(self) -> Architecture:
        """The model class anew, without memory: no adapter was ever on it."""
        return read_architecture(
            self.directory, self.config, trust_remote_code=self.trust_remote_code
        )

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
