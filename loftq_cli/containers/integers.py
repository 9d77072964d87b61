"""What the containers of integer codes have in common: the grid, its blocks, and what fits them.

They hold the same codes and the same scales in another order, so nothing is rounded on the way from
one to the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

from loftq_cli.containers import packing
from loftq_cli.containers.base import Container, Damaged, Form, StoredWeight, Weight
from loftq_cli.errors import UsageError
from loftq_cli.formats import DTYPE_NAMES, INTEGER_BITS, INTEGER_BLOCK_SIZES, WHOLE_ROW

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from loftq_cli.core.integers import IntegerFormat, QuantizedIntegers
    from loftq_cli.core.steps import Quantizer


class Integers(Container):
    all_widths = INTEGER_BITS
    number_types = ("int",)
    options = ("block_size",)
    block_sizes = INTEGER_BLOCK_SIZES
    searches = True
    why_uncalibrated = None
    wants_dtype = True
    even_when_fused = True
    # Of out and in: what its files and kernels want whole groups of.
    multiples: ClassVar[tuple[int, int]] = (1, packing.GROUP)
    # X.part holds the packed codes.
    codes_part: ClassVar[str]

    @classmethod
    def of(cls, form: Form) -> Container:
        if form.block_size not in cls.block_sizes:
            raise UsageError(
                f"no block size {form.block_size} in {cls.name}",
                cause="servers have kernels for integers in blocks of 32, 64 and 128, and for "
                "whole rows (-1)",
                hint="--block-size 64",
            )
        return cls(cls.number_types[0], form.block_size)

    @classmethod
    def weights_in(cls, names: Iterable[str]) -> set[str]:
        end = f".{cls.codes_part}"
        return {f"{name.removesuffix(end)}.weight" for name in names if name.endswith(end)}

    @classmethod
    def codes_of(cls, weight: str) -> str:
        """The tensor with the packed codes of X.weight."""
        return f"{weight.removesuffix('.weight')}.{cls.codes_part}"

    def why_unfit(self, weight: Weight) -> str | None:
        rows, columns = weight.shape
        if rows % self.multiples[0] or columns % self.multiples[1]:
            packed = self.multiples[1]
            return f"it is {rows}×{columns}, and the container packs whole groups of {packed}"
        if columns % abs(self._block_size):
            return f"its rows have {columns} weights, and {self.name} has whole blocks in a row"
        return None

    def working_bytes(self, weight: Weight) -> int:
        """A byte a code whatever its width, and float32 scales."""
        rows, columns = weight.shape
        return rows * (columns + 4 * self._blocks(columns))

    def quantizer(self, bits: int, *, search: bool = True) -> Quantizer:
        from loftq_cli.core.quantizers import Integers as IntegerQuantizer

        return IntegerQuantizer(self._format(bits), search=search)

    def require_codes(self, stored: StoredWeight) -> None:
        """Also refuses scales that the other containers could not hold."""
        import torch

        scales = self.quantized(stored).scales
        for dtype in (torch.bfloat16, torch.float16):
            held = (scales.to(dtype).float() == scales) & scales.isfinite()
            if not bool(held.all()):
                stray = float(scales[~held][0])
                raise Damaged(f"{stray:.9g} is among its scales, which {dtype} does not hold")

    def quantized(self, stored: StoredWeight) -> QuantizedIntegers:
        from loftq_cli.core.integers import QuantizedIntegers

        codes, scales = self._codes_and_scales(stored)
        return QuantizedIntegers(
            codes, scales, self._format(stored.weight.bits), dtype_of(stored.weight)
        )

    def _codes_and_scales(self, stored: StoredWeight) -> tuple[Tensor, Tensor]:
        """int8 (out, in) and float32 (out, blocks of a row)."""
        raise NotImplementedError

    def _blocks(self, columns: int) -> int:
        """Of a row of so many weights."""
        return 1 if self._block_size == WHOLE_ROW else columns // self._block_size

    @property
    def _block_size(self) -> int:
        assert self.block_size is not None
        return self.block_size

    def _format(self, bits: int) -> IntegerFormat:
        from loftq_cli.core.integers import IntegerFormat

        return IntegerFormat(bits, None if self.block_size == WHOLE_ROW else self.block_size)

    def _names(self, weight: str, *parts: str) -> list[str]:
        """X.part of the weight X.weight."""
        return [f"{weight.removesuffix('.weight')}.{part}" for part in parts]


def dtype_of(weight: Weight) -> torch.dtype:
    """What the runtime computes with it in."""
    import torch

    dtype: torch.dtype = getattr(torch, DTYPE_NAMES[weight.dtype])
    return dtype


def by_width(weights: Sequence[Weight]) -> dict[int, list[str]]:
    """The modules of each width, the most common first: readers of one width only take that one."""
    found: dict[int, list[str]] = {}
    for weight in sorted(weights, key=lambda each: each.module):
        found.setdefault(weight.bits, []).append(weight.module)
    return dict(sorted(found.items(), key=lambda each: (-len(each[1]), each[0])))
