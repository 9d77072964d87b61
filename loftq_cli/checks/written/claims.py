"""What the report of a written directory claims.

A report may come from a stranger with the rest of the directory. Nothing in it is believed, and
nothing outside the directory is opened on its word but the source that it names.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from loftq_cli import schema
from loftq_cli.containers import container_of
from loftq_cli.containers.base import Container
from loftq_cli.engines.report_file import NOT_OURS, Report
from loftq_cli.errors import CorruptCheckpoint, UsageError
from loftq_cli.formats import DTYPE_NAMES
from loftq_cli.models.source import REPORT_FILE


@dataclass(frozen=True)
class ClaimedLayer:
    """A linear layer by the report. ``error`` is ‖W − Q − s·B·A‖ / ‖W‖, or null, and ``backbone``
    the same without the adapter.

    ``bits`` is what a code tells, ``rank`` that of the correction; A and B are padded to
    ``stored_rank``. Without an adapter both are 0.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    rank: int
    stored_rank: int
    error: float | None
    backbone: float | None


@dataclass(frozen=True)
class Claims:
    """What the report says was written, and how; ``source`` is the model's name, for messages."""

    source: str
    container: Container
    results: schema.QuantizeResults
    layers: Sequence[ClaimedLayer]

    @property
    def scaling(self) -> float:
        """s in W ≈ Q + s·B·A, by the rank that was asked for: that of all layers."""
        return self.settings.lora_alpha / self._divisor(self.settings.rank)

    @property
    def quantized(self) -> Sequence[ClaimedLayer]:
        return self.layers if self.container.quantizes else []

    @property
    def config_rank(self) -> int:
        """The rank that the adapter's config names; its pattern has those that differ from it."""
        ranks = {layer.stored_rank for layer in self.adapted}
        return ranks.pop() if len(ranks) == 1 else self.settings.rank

    @property
    def config_alpha(self) -> float:
        """The lora_alpha that gives ``config_rank`` the scaling that all layers have."""
        if self.config_rank == self.settings.rank:
            return self.settings.lora_alpha
        return self.scaling * self._divisor(self.config_rank)

    @property
    def adapted(self) -> list[ClaimedLayer]:
        return [layer for layer in self.layers if layer.stored_rank]

    @property
    def listed(self) -> Sequence[schema.AdaptedLayer | schema.PlainLayer]:
        """The layers as the report has them, those without an adapter at the end."""
        return [*self.results.layers, *self.results.without_adapter]

    @property
    def settings(self) -> schema.QuantizeSettings:
        return self.results.settings

    def _divisor(self, rank: int) -> float:
        return rank**0.5 if self.settings.rslora else rank


def claims_of(report: Report) -> Claims:
    """What the report says, in the form that the checks want.

    Raises:
        CorruptCheckpoint: it names a format that loftq never wrote.
    """
    settings, model = report.results.settings, report.model
    container = None
    with suppress(KeyError, UsageError):
        container = container_of(settings.container, settings.bits, settings)
    if container is None or settings.rank < 1 or not settings.lora_alpha > 0:
        raise _unusable(
            f"{settings.bits} bits, {settings.quant_type!r:.40}, block size {settings.block_size}, "
            f"rank {settings.rank}, lora_alpha {settings.lora_alpha}"
        )
    if settings.dtype not in (None, *DTYPE_NAMES.values()):
        raise _unusable(f"dtype {settings.dtype!r:.40}")
    if settings.adapter_dtype not in DTYPE_NAMES.values():
        raise _unusable(f"adapter_dtype {settings.adapter_dtype!r:.40}")
    source = "a model that the report does not name"
    if (merged := report.results.merged) is not None:
        source = f"what `loftq merge {merged.source} --adapter {merged.adapter}` writes"
    elif model is not None:
        source = model.id if model.revision is None else f"{model.id}@{model.revision}"
    return Claims(source, container, report.results, _layers(report.results, container))


def _layers(results: schema.QuantizeResults, container: Container) -> list[ClaimedLayer]:
    """All layers, once their bits and ranks have been seen to be such as loftq writes."""
    adapted = [
        ClaimedLayer(
            layer.name,
            layer.shape,
            layer.bits or 0,
            layer.rank or 0,
            layer.stored_rank or layer.rank or 0,
            layer.weight_error_relative,
            layer.backbone_error_relative,
        )
        for layer in results.layers
    ]
    # Before there was a search for the absmax, plain quantization was all that such a layer had.
    plain = [
        ClaimedLayer(
            layer.name,
            layer.shape,
            layer.bits or 0,
            0,
            0,
            layer.quantized_only_error_relative
            if layer.weight_error_relative is None
            else layer.weight_error_relative,
            None,
        )
        for layer in results.without_adapter
    ]
    for layer in adapted:
        if not 1 <= layer.rank <= layer.stored_rank:
            raise _unusable(f"{layer.name} has rank {layer.rank}, stored as {layer.stored_rank}")
    for layer in (*adapted, *plain):
        if layer.bits not in container.widths:
            raise _unusable(f"{layer.name} has {layer.bits} bits in {container.quant_type!r:.40}")
    return [*adapted, *plain]


def _unusable(cause: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"{REPORT_FILE} cannot be used",
        cause=f"its settings are none that loftq writes: {cause}",
        hint=NOT_OURS,
    )
