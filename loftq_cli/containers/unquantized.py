"""Weights as they were, each copied in the source's orientation: the container of plain LoRA."""

from __future__ import annotations

from typing import ClassVar

from loftq_cli.checkpoint.writer import PlannedTensor
from loftq_cli.containers.base import Container, Weight


class Unquantized(Container):
    name: ClassVar[str] = "none"
    all_widths: ClassVar[tuple[int, ...]] = (16,)
    number_types: ClassVar[tuple[str, ...]] = ("none",)
    quantizes: ClassVar[bool] = False

    def planned(self, weight: Weight) -> list[PlannedTensor]:
        shape = weight.shape[::-1] if weight.transposed else weight.shape
        return [PlannedTensor(weight.name, weight.dtype, shape)]


CONTAINER = Unquantized
