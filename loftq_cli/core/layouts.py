"""How codes and scales lie while the compiled loops work on them, and which loops those are."""

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from loftq_cli.core import integer_kernels, kernels, search_kernels
from loftq_cli.core.absmax import starts_for
from loftq_cli.core.blockwise import (
    BlockwiseFormat,
    QuantizedBlockwise,
    double_quantize,
    restore_absmax,
)
from loftq_cli.core.codebooks import Codebook, Levels, codebook
from loftq_cli.core.integers import IntegerFormat, QuantizedIntegers
from loftq_cli.core.parallel import all_threads

_ROUNDING = {
    torch.float32: kernels.FLOAT32,
    torch.bfloat16: kernels.BFLOAT16,
    torch.float16: kernels.FLOAT16,
}


class Layout(ABC):
    """A format for weights of this shape (out, in) that are dequantized to ``dtype``.

    The loops take a run of blocks: its weight and what is subtracted from it, flat (:func:`flat`),
    and its codes and scales (or absmax). ``rest`` gets what the codes leave, unless it is empty.
    """

    # Whether scales are rounded all together, after the last one is known.
    rounds_together: bool = False
    code_dtype: ClassVar[torch.dtype]

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype
        self.rounding = _ROUNDING[dtype]

    # Set by each: values in a block, what codes stand for, and what no scale may exceed.
    block_size: int
    levels: Levels
    largest: float

    @abstractmethod
    def codes(self, values: slice) -> slice:
        """Where the codes of these values lie; both count from the weight's first."""

    @abstractmethod
    def stored(self, codes: Tensor, scales: Tensor) -> Any:
        """The stored form of all codes and scales, flat."""

    @abstractmethod
    def parts(self, stored: Any) -> tuple[Tensor, Tensor]:
        """Codes and scales of a stored form as it is read back, flat."""

    def search(self, w: Any, product: Any, previous: Tensor | None, scales: Tensor) -> None:
        """Finds the ``scales`` of w − product, from the ``previous`` ones on."""
        starts = starts_for(self.levels, warm=previous is not None)
        search_kernels.search(
            w,
            product,
            self.block_size,
            *self._search_levels(),
            (torch.empty(0) if previous is None else previous).numpy(),
            np.array(starts.factors, np.float32),
            starts.passes,
            np.float32(self.largest),
            scales.numpy(),
        )

    @abstractmethod
    def _search_levels(self) -> tuple[Any, Any]:
        """Borders and levels for the search."""

    @abstractmethod
    def quantize(
        self, w: Any, product: Any, codes: Tensor, scales: Tensor, rest: Any, *, given: bool
    ) -> float:
        """Codes and, unless ``given``, scales of w − product; returns ‖w − Q‖²."""

    @abstractmethod
    def leave(self, w: Any, codes: Tensor, scales: Tensor, rest: Any) -> float:
        """w − Q of codes and scales into ``rest``; returns its square."""


class BlockwiseLayout(Layout):
    """bitsandbytes': two codes a byte, and blocks that may reach over the ends of rows."""

    code_dtype = torch.uint8

    def __init__(self, fmt: BlockwiseFormat, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self.format = fmt
        self.block_size = fmt.block_size
        self.levels = book = codebook(fmt.quant_type, fmt.bits)
        self.largest = torch.finfo(dtype).max
        self.rounds_together = fmt.double_quant
        self.choices = choices(book)
        self.table = codebook(fmt.quant_type).level_tensor().numpy()

    def codes(self, values: slice) -> slice:
        return slice(values.start // 2, (values.stop + 1) // 2)

    def stored(self, codes: Tensor, scales: Tensor) -> QuantizedBlockwise:
        with all_threads():
            absmax = double_quantize(scales, self.format)
        return QuantizedBlockwise(codes.view(-1, 1), *absmax, self.shape, self.format, self.dtype)

    def parts(self, stored: QuantizedBlockwise) -> tuple[Tensor, Tensor]:
        return stored.packed.view(-1), restore_absmax(stored)

    def _search_levels(self) -> tuple[Any, Any]:
        return self.choices[:2]

    def quantize(
        self, w: Any, product: Any, codes: Tensor, scales: Tensor, rest: Any, *, given: bool
    ) -> float:
        into = self.rounding, codes.numpy(), scales.numpy(), rest
        return kernels.quantize(w, product, self.block_size, *self.choices, given, *into)

    def leave(self, w: Any, codes: Tensor, scales: Tensor, rest: Any) -> float:
        stored = codes.numpy(), scales.numpy(), self.block_size, self.table
        return kernels.form_residual(w, *stored, self.rounding, rest)


class IntegerLayout(Layout):
    """A code a byte, before a container packs them, and blocks that end where rows end."""

    code_dtype = torch.int8

    def __init__(self, fmt: IntegerFormat, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self.format = fmt
        self.block_size = fmt.size(shape[1])
        self.levels = grid = fmt.grid
        self.largest = fmt.largest_scale
        self.share = np.float32(grid.plain_share)
        self.bounds = np.float32(grid.lowest), np.float32(grid.highest)

    def codes(self, values: slice) -> slice:
        return values

    def stored(self, codes: Tensor, scales: Tensor) -> QuantizedIntegers:
        by_row = scales.view(self.shape[0], -1)
        return QuantizedIntegers(codes.view(self.shape), by_row, self.format, self.dtype)

    def parts(self, stored: QuantizedIntegers) -> tuple[Tensor, Tensor]:
        return stored.codes.view(-1), stored.scales.view(-1)

    def _search_levels(self) -> tuple[Any, Any]:
        return None, self.bounds

    def quantize(
        self, w: Any, product: Any, codes: Tensor, scales: Tensor, rest: Any, *, given: bool
    ) -> float:
        limits = self.bounds, self.share, np.float32(self.largest), given
        into = self.rounding, codes.numpy(), scales.numpy(), rest
        return integer_kernels.quantize(w, product, self.block_size, *limits, *into)

    def leave(self, w: Any, codes: Tensor, scales: Tensor, rest: Any) -> float:
        stored = codes.numpy(), scales.numpy(), self.block_size
        return integer_kernels.form_residual(w, *stored, self.rounding, rest)


def layout(
    fmt: BlockwiseFormat | IntegerFormat, shape: tuple[int, int], dtype: torch.dtype
) -> Layout:
    """That of the format."""
    if isinstance(fmt, BlockwiseFormat):
        return BlockwiseLayout(fmt, shape, dtype)
    return IntegerLayout(fmt, shape, dtype)


def flat(matrix: Tensor) -> Any:
    """A one-dimensional numpy view; bfloat16 as its bits in uint16."""
    values = matrix.view(-1)
    return (values if values.dtype == torch.float32 else values.view(torch.uint16)).numpy()


@lru_cache(maxsize=8)
def choices(book: Codebook) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """Borders, levels and codes in ascending order, as the kernels want them: always sixteen."""
    before, after = _beside(book)
    borders = book.midpoints().numpy()
    return (
        tuple(np.pad(borders, (before, after), constant_values=(-np.inf, np.inf))),
        sixteen(book, book.ascending().numpy()),
        sixteen(book, book.order_tensor().int().numpy()),
    )


def sixteen(book: Codebook, values: Any) -> tuple[Any, ...]:
    """What belongs to each of the ascending levels, filled up as those are."""
    return tuple(np.pad(values, _beside(book), mode="edge"))


def _beside(book: Codebook) -> tuple[int, int]:
    """How many are missing to sixteen levels on either side.

    They are behind borders that nothing is below or above, and the zero is where that of sixteen
    is: the eighth.
    """
    before = 7 - book.ascending().tolist().index(0.0)
    return before, 16 - len(book.order) - before
