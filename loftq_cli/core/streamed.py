"""A weight too large to hold, and what its quantization leaves: both formed again piece by piece.

The pieces are cut as those of what is held, and each product takes the same values in the same
order, so every bit of the result is the same. What it costs is time: every product with the
residual reads the weight and the codes once more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from loftq_cli.core.parallel import each
from loftq_cli.core.residual import Residual, rows_a_piece, rows_times, sum_of_squares
from loftq_cli.core.sketches import COLUMNS, slab_columns


class RowsOnDemand:
    """A weight (out × in) that is somewhere else: ``W[3:7]`` fetches these rows, from any thread.

    It takes the place of a tensor where a quantizer goes through the weight by rows, on the CPU.
    """

    device = torch.device("cpu")
    ndim = 2

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        fetch: Callable[[int, int], Tensor],
    ) -> None:
        """``fetch(first, last)`` gives rows ``first`` to ``last`` (not included) in ``dtype``."""
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self._fetch = fetch

    def numel(self) -> int:
        return self.shape.numel()

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        return self._fetch(start, stop)

    def whole(self) -> Tensor:
        """All of it, held."""
        return self[:]


# Writes W − Q of some rows and columns (a slice of each) into a contiguous matrix of that size.
Leave = Callable[[slice, slice, Tensor], object]


@dataclass(frozen=True, kw_only=True)
class StreamedResidual(Residual):
    """A residual that is formed anew for every product.

    ``matrix`` is empty and tells no more than the dtype of the products.
    """

    out_features: int
    in_features: int
    unit: int  # columns begin and end at multiples of this
    leave: Leave

    @property
    def shape(self) -> tuple[int, int]:
        return (self.out_features, self.in_features)

    def times(self, V: Tensor) -> Tensor:
        if self.probed is not None and V is self.probe:
            return self.probed
        V = V.to(self.matrix.dtype)
        out = V.new_empty(self.out_features, V.shape[1])
        rows = rows_a_piece(*self.shape)

        def multiply(piece: int) -> None:
            part = slice(piece * rows, min((piece + 1) * rows, self.out_features))
            torch.mm(self._formed(part, slice(0, self.in_features)), V, out=out[part])

        each(multiply, -(-self.out_features // rows))
        return out

    def transposed_times(self, Y: Tensor) -> Tensor:
        """By slabs of columns: each sum goes over all rows at once, as it does when held."""
        Y = Y.to(self.matrix.dtype)
        out = Y.new_empty(self.in_features, Y.shape[1])
        width = slab_columns(self.out_features, self.unit)
        for start in range(0, self.in_features, width):
            columns = slice(start, min(start + width, self.in_features))
            out[columns] = rows_times(self._slab(columns).t(), Y, COLUMNS)
        return out

    def _slab(self, columns: slice) -> Tensor:
        slab = self.matrix.new_empty(self.out_features, columns.stop - columns.start)
        # Whole rows are fetched for it, so the pieces are those of whole rows.
        rows = rows_a_piece(*self.shape)

        def fill(piece: int) -> None:
            part = slice(piece * rows, min((piece + 1) * rows, self.out_features))
            self.leave(part, columns, slab[part])

        each(fill, -(-self.out_features // rows))
        return slab

    def _formed(self, rows: slice, columns: slice) -> Tensor:
        part = self.matrix.new_empty(rows.stop - rows.start, columns.stop - columns.start)
        self.leave(rows, columns, part)
        return part


def weight_as_residual(W: Tensor | RowsOnDemand) -> Residual:
    """The weight itself, as something to decompose; on demand, nothing of it is held."""
    if not isinstance(W, RowsOnDemand):
        return Residual.of(W.float())

    def leave(rows: slice, columns: slice, out: Tensor) -> None:
        out.copy_(W[rows][:, columns])

    return StreamedResidual(
        torch.empty(0),
        sum_of_squares(cast(Tensor, W)),
        out_features=W.shape[0],
        in_features=W.shape[1],
        unit=1,
        leave=leave,
    )
