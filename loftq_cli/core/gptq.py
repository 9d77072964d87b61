"""Rounding to codes when inputs are correlated: what one code does wrong, others can make good.

For a target T (out × in) and the inputs' second moments G = E[x·xᵀ] (in × in, positive definite)
the codes and absmax of Q are to minimize what the error does to the outputs,

    E‖(T − Q)·x‖² = tr((T − Q)·G·(T − Q)ᵀ)

Every row of T is a problem of its own. Two ways to a good Q, neither to the best:

- :func:`gptq` goes once from the first input to the last and passes what rounding one column
  did wrong on to the columns that come after it (GPTQ, arXiv 2210.17323; the rule is from Optimal
  Brain Surgeon). With G⁻¹ = Uᵀ·U, U upper triangular, and e = (t_j − q_j) / U_jj the rest of the
  row becomes t_k − e·U_jk, and rounding column j costs e² of the sum above. So a block's absmax is
  searched when its first column is reached, with the weights 1 / U_jj².

  U itself is not needed. With U = S⁻¹, S·Sᵀ = G, the errors of the columns before b are
  E = (T − Q)_<b · S_<b,<b, and what they make of the columns from b on, T − E·U, is
  T + (T − Q)_<b · S_<b,≥b · U_≥b,≥b: only blocks on the diagonal are inverted.
- :func:`descend` starts from any Q and takes code after code to the best that it can be while all
  others stay: the level nearest to q_j + ((T − Q)·G)_j / G_jj. Then every block's absmax goes where
  the sum, a parabola in it, is least. None of this ever raises the sum.

Where blocks reach over the ends of rows, a block's codes belong to two problems; its absmax then
stays what it was.

For integers, absmax are the scales (``codebooks.py``): each goes to the nearest that can be stored,
which on a parabola is the best of those, and it goes there at once, so that the codes which follow
make good what the rounding did.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loftq_cli.core import columns as readable_loops
from loftq_cli.core.codebooks import Codebook, Levels
from loftq_cli.core.parallel import each
from loftq_cli.core.residual import rows_a_piece, worth_compiling

# Columns that are rounded one by one before what that does is passed on to others at once, and
# columns that get it before all do: wide products are faster than narrow ones.
_COLUMNS, _WIDE = 64, 512
# The fewest rows for which products are fast.
_PAYS = 256
# Where the search for an absmax starts, as a share of the largest value and of either sign, and how
# often it then takes the best absmax for the codes and the codes for that. More of either ends no
# better, since :func:`descend` follows.
_SHARES = (1.0, 0.9, 0.8, 0.65, 0.45, -1.0, -0.9, -0.8, -0.65, -0.45)
_ROUNDS = 1
_SMALLEST = 1e-30


@dataclass(frozen=True)
class Grid:
    """The values that codes may stand for, and how blocks lie in a weight of this shape."""

    book: Levels
    levels: Tensor  # float32 (k,), ascending
    midpoints: Tensor  # float32 (k − 1,)
    block_size: int
    shape: tuple[int, int]
    most: float  # what no stored absmax's magnitude may exceed
    unit: float  # the weight worked on is the stored one times this, a power of two

    @classmethod
    def of(cls, book: Levels, block_size: int, W: Tensor, most: float, unit: float = 1.0) -> "Grid":
        levels, midpoints = book.ascending(W.device), book.midpoints(W.device)
        return cls(book, levels, midpoints, block_size, (W.shape[0], W.shape[1]), most, unit)

    @property
    def largest(self) -> float:
        """``most`` as the weight is worked on."""
        return min(self.most * self.unit, torch.finfo(torch.float32).max)

    @property
    def rounds(self) -> bool:
        """Whether not every float32 is a possible absmax."""
        return not isinstance(self.book, Codebook)

    def possible(self, absmax: Tensor) -> Tensor:
        """The nearest absmax that can be stored; where that is 0, one that is as good as 0."""
        if isinstance(self.book, Codebook):
            return absmax
        stored = self.book.possible(absmax / self.unit, self.most) * self.unit
        return stored.masked_fill_(stored == 0, _SMALLEST)

    @property
    def aligned(self) -> bool:
        """Whether every block lies within one row."""
        return self.shape[1] % self.block_size == 0

    def scales(self, absmax: Tensor, rows: slice, columns: slice) -> Tensor:
        """The absmax of these values (columns × rows), none of them zero."""
        size = self.block_size
        if self.aligned:
            blocks = slice(columns.start // size, -(-columns.stop // size))
            by_block = absmax.view(self.shape[0], -1)[rows, blocks].t()
            by_block = torch.where(by_block == 0, _SMALLEST, by_block)
            first = columns.start - blocks.start * size
            return by_block.repeat_interleave(size, 0)[first : first + columns.stop - columns.start]
        row = torch.arange(rows.start, rows.stop, device=absmax.device)
        column = torch.arange(columns.start, columns.stop, device=absmax.device)
        scales = absmax[(row[None, :] * self.shape[1] + column[:, None]) // size]
        return scales.masked_fill_(scales == 0, _SMALLEST)

    def usable(self, absmax: Tensor) -> Tensor:
        """Which of these a block may have: of either sign, as in ``absmax.py``."""
        return (absmax.abs() > _SMALLEST) & (absmax.abs() <= self.largest)

    def nearest(self, values: Tensor) -> Tensor:
        """Indices of the levels nearest to values of blocks whose absmax is 1."""
        return torch.bucketize(values, self.midpoints)


@dataclass(frozen=True)
class Rounding:
    """A quantized weight while it is worked on."""

    indices: Tensor  # uint8 (out, in): into the ascending levels
    absmax: Tensor  # float32 (blocks,)


@torch.no_grad()
def gptq(T: Tensor, root: Tensor, grid: Grid, absmax: Tensor | None = None) -> Rounding:
    """Round ``T`` as GPTQ does; ``absmax``, if given, is kept, and otherwise searched.

    ``root`` (in × in) is the upper triangular S with S·Sᵀ the inputs' moments.
    """
    free = absmax is None
    if absmax is None:
        absmax = T.new_empty(T.numel() // grid.block_size)
    indices = torch.empty(T.shape, dtype=torch.uint8, device=T.device)
    weights = root.diagonal().square()
    loops = column_loops(T, grid)
    # No further than a block: the next one's absmax is searched in what this one passes on.
    size = min(_COLUMNS, grid.block_size)
    inverses = _inverses(root, {size, grid.block_size} if free else {size})

    def work(rows: slice) -> None:
        target = T[rows].t().contiguous()
        rest = torch.empty_like(target)  # (T − Q)ᵀ
        chosen = torch.empty(target.shape, dtype=torch.uint8, device=T.device)
        for wide in _chunks(0, T.shape[1], _wide(grid.block_size)):
            # (T − Q)·S in these columns, of those before.
            passed = root[: wide.start, wide].t() @ rest[: wide.start]
            for columns in _chunks(wide.start, wide.stop, size):
                if free and columns.start % grid.block_size == 0:
                    block = slice(columns.start, columns.start + grid.block_size)
                    ideal = target[block]
                    if columns.start:
                        after = passed[_within(wide, block)]
                        ideal = torch.addmm(ideal, inverses[block.start, block.stop].t(), after)
                    found = _search(loops, ideal, weights[block], grid)
                    first = columns.start // grid.block_size
                    absmax.view(T.shape[0], -1)[rows, first] = found
                U = inverses[columns.start, columns.stop]
                ideal = torch.addmm(target[columns], U.t(), passed[_within(wide, columns)])
                scales = grid.scales(absmax, rows, columns)
                value = loops.pass_on(ideal, scales, U, grid, chosen[columns])
                torch.sub(target[columns], value, out=rest[columns])
                after = slice(columns.stop, wide.stop)
                passed[_within(wide, after)].addmm_(root[columns, after].t(), rest[columns])
        indices[rows] = chosen.t()

    _for_rows(work, T)
    return Rounding(indices, absmax)


def _inverses(root: Tensor, sizes: set[int]) -> dict[tuple[int, int], Tensor]:
    """Those of the blocks of these sizes on the diagonal, by their first and last column."""
    n = root.shape[0]
    parts = {(part.start, part.stop) for size in sizes for part in _chunks(0, n, size)}
    found = {}
    for start, stop in parts:
        if start > 0 or stop - start <= _COLUMNS:  # no large one at the beginning is asked for
            eye = torch.eye(stop - start, device=root.device)
            block = root[start:stop, start:stop]
            found[start, stop] = torch.linalg.solve_triangular(block, eye, upper=True)
    return found


def _search(loops: Any, block: Tensor, weights: Tensor, grid: Grid) -> Tensor:
    """The absmax (rows,) that rounds ``block`` (columns × rows) best in the weighted square."""
    shares = tuple(share / grid.book.outermost for share in _SHARES)
    return loops.search(block, weights, grid, shares, _ROUNDS, _SMALLEST)


@torch.no_grad()
def descend(
    T: Tensor, G: Tensor, start: Rounding, grid: Grid, *, sweeps: int, free: bool
) -> Rounding:
    """Improve ``start`` code by code, ``sweeps`` times over; the absmax too if they are free."""
    free = free and grid.aligned
    indices, absmax = torch.empty_like(start.indices), start.absmax.clone()
    loops = column_loops(T, grid)
    size = grid.block_size if free else _COLUMNS

    def work(rows: slice) -> None:
        chosen = start.indices[rows].t().contiguous()
        rest = T[rows].t().clone(memory_format=torch.contiguous_format)
        for columns in _chunks(0, T.shape[1]):
            scales = grid.scales(absmax, rows, columns)
            rest[columns] -= grid.levels[chosen[columns].int()] * scales
        for wide in [*_chunks(0, T.shape[1], _wide(size))] * sweeps:
            slope = G[wide] @ rest
            for columns in _chunks(wide.start, wide.stop, size):
                scales = grid.scales(absmax, rows, columns)
                part = slope[_within(wide, columns)], scales, G[columns, columns]
                moved, refit = _descend_columns(loops, *part, grid, chosen[columns], free)
                rest[columns] -= moved
                after = slice(columns.stop, wide.stop)
                slope[_within(wide, after)].addmm_(G[after, columns], moved, alpha=-1)
                if free:
                    absmax.view(T.shape[0], -1)[rows, columns.start // grid.block_size] = refit
        indices[rows] = chosen.t()

    _for_rows(work, T)
    return Rounding(indices, absmax)


def _descend_columns(
    loops: Any, slope: Tensor, scales: Tensor, G: Tensor, grid: Grid, chosen: Tensor, free: bool
) -> tuple[Tensor, Tensor]:
    """Some columns' codes, then where it is free their block's absmax.

    ``slope`` is these columns' part of G·(T − Q)ᵀ, and ``chosen`` follows. Returned are how far the
    values of Qᵀ moved, and the absmax.
    """
    moved, level = torch.empty_like(slope), torch.empty_like(slope)
    # Along the levels the sum of squares is a parabola. As G is symmetric, what columns do to those
    # before them is what those do to them, and half of the products are enough.
    along = torch.zeros_like(slope)  # G·level of the columns before
    square, first = torch.zeros_like(scales[0]), torch.zeros_like(scales[0])
    for columns in _chunks(0, slope.shape[0]):
        after, own = slice(columns.stop, None), G[columns, columns]
        part = loops.improve(slope[columns], scales[columns], own, grid, chosen[columns])
        moved[columns], level[columns] = part
        slope[after].addmm_(G[after, columns], moved[columns], alpha=-1)
        if free:
            seen = torch.addmm(along[columns], own, level[columns])
            square += (level[columns] * (seen + along[columns])).sum(dim=0)
            first += (level[columns] * slope[columns] - moved[columns] * seen).sum(dim=0)
            along[after].addmm_(G[after, columns], level[columns])
    if not free:
        return moved, scales[0]
    step = first / square.clamp_min(_SMALLEST)
    absmax = scales[0] + step
    if grid.rounds:
        absmax = grid.possible(absmax)
        step = absmax - scales[0]
    fits = (square > 0) & grid.usable(absmax)
    moved.addcmul_(level, torch.where(fits, step, 0.0))
    return moved, torch.where(fits, absmax, scales[0])


def column_loops(T: Tensor, grid: Grid) -> Any:
    """The loops for a weight of this size on its device: a module like ``columns.py``."""
    if T.is_cuda:
        from loftq_cli.core import cuda_columns

        if cuda_columns.takes(T, grid):
            return cuda_columns
    if worth_compiling(T):
        from loftq_cli.core import compiled_columns

        return compiled_columns
    return readable_loops


def _for_rows(work: Callable[[slice], None], T: Tensor) -> None:
    """Work on some rows at a time, whatever the number of threads."""
    rows, columns = T.shape
    size = max(rows_a_piece(rows, columns), _PAYS) if T.device.type == "cpu" else rows
    each(lambda i: work(slice(i * size, min(i * size + size, rows))), -(-rows // size))


def _chunks(start: int, stop: int, size: int = _COLUMNS) -> Iterator[slice]:
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))


def _wide(size: int) -> int:
    """Whole pieces of this size that are worth a product together."""
    return -(-_WIDE // size) * size


def _within(wide: slice, columns: slice) -> slice:
    """Where these columns are among the wider ones."""
    return slice(columns.start - wide.start, columns.stop - wide.start)
