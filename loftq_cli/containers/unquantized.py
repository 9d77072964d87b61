"""Weights as they were, each copied in the source's orientation: the container of plain LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loftq_cli.checkpoint.writer import PlannedTensor
from loftq_cli.containers.base import Container, StoredWeight, Weight

if TYPE_CHECKING:
    from torch import Tensor


class Unquantized(Container):
    name = "none"
    all_widths = (16,)
    number_types = ("none",)
    quantizes = False
    why_experts_stay = "an expert, as it was"

    def planned(self, weight: Weight) -> list[PlannedTensor]:
        shape = weight.shape[::-1] if weight.transposed else weight.shape
        return [PlannedTensor(weight.name, weight.dtype, shape)]

    def runtime(self, stored: StoredWeight) -> Tensor:
        return stored.codes.t() if stored.weight.transposed else stored.codes


CONTAINER = Unquantized
