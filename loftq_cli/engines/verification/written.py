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
from loftq_cli.engines.tasks import Progress
from loftq_cli.errors import CheckFailed
from loftq_cli.models.architecture import Architecture, read_architecture
from loftq_cli.models.source import read_config

WRITE_AGAIN = "copy it again from where it was written, or run `loftq quantize` again"


@dataclass(frozen=True)
class ClaimedLayer:
    """A quantized layer by the report. ``error`` is ‖W − Q − s·B·A‖ / ‖W‖, or null."""

    name: str
    shape: tuple[int, int]
    adapted: bool
    error: float | None


@dataclass(frozen=True)
class ClaimedFile:
    name: str
    bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Claims:
    """What the report says was written, from what, and how."""

    source: str  # the model's name, for messages
    bits: int
    quant_type: str
    block_size: int | None
    double_quant: bool
    rank: int
    lora_alpha: float
    use_rslora: bool
    task_type: str | None
    auto_class: str  # the transformers class that the README loads it with
    layers: Sequence[ClaimedLayer]
    files: Sequence[ClaimedFile]
    source_files: frozenset[tuple[str, int, str]]  # name, bytes, hash of the header

    @property
    def scaling(self) -> float:
        """s in W ≈ Q + s·B·A."""
        return self.lora_alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    @property
    def adapted(self) -> list[ClaimedLayer]:
        return [layer for layer in self.layers if layer.adapted]


@dataclass
class Written:
    """The directory that is verified. What several checks share is opened when first needed."""

    directory: Path
    claims: Claims
    device: str
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
    def weights(self) -> dict[str, str]:
        """The tensor with the codes of each module that is stored quantized."""
        names = [info.name for _, info in self.checkpoint.tensors.values()]
        coded = {name.rpartition(".")[0] for name in names if name.endswith(".absmax")}
        coded |= {f"{name.removesuffix('.SCB')}.weight" for name in names if name.endswith(".SCB")}
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
            raise CheckFailed(
                f"{layer.name} is not stored in {self.claims.bits} bits",
                cause="the report has the layer, and no weight file has codes and scales of it",
                hint=WRITE_AGAIN,
            ) from None
