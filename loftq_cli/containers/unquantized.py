"""Weights as they were, each copied in the source's orientation: the container of plain LoRA."""

from __future__ import annotations

from loftq_cli.checkpoint.writer import PlannedTensor
from loftq_cli.containers.base import Container, Weight


class Unquantized(Container):
    name = "none"
    all_widths = (16,)
    number_types = ("none",)
    quantizes = False

    def planned(self, weight: Weight) -> list[PlannedTensor]:
        shape = weight.shape[::-1] if weight.transposed else weight.shape
        return [PlannedTensor(weight.name, weight.dtype, shape)]


CONTAINER = Unquantized
