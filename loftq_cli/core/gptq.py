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

from loftq_cli.core.codebooks import Codebook, Levels
from loftq_cli.core.parallel import each

# Columns that are rounded one by one before their errors are passed on to all others at once.
_COLUMNS = 64
# Values of a piece of rows, 16 MiB in float32: of each temporary there are a few of this size.
_PIECE = 1 << 22
# Rows that take hardly longer than one.
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
        row = torch.arange(rows.start, rows.stop, device=absmax.device)
        column = torch.arange(columns.start, columns.stop, device=absmax.device)
        scales = absmax[(row[None, :] * self.shape[1] + column[:, None]) // self.block_size]
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
def gptq(T: Tensor, U: Tensor, grid: Grid, absmax: Tensor | None = None) -> Rounding:
    """Round ``T`` as GPTQ does; ``absmax``, if given, is kept, and otherwise searched.

    ``U`` (in × in) is the upper triangular root of the inverse of the inputs' moments.
    """
    free = absmax is None
    if absmax is None:
        absmax = T.new_empty(T.numel() // grid.block_size)
    indices = torch.empty(T.shape, dtype=torch.uint8, device=T.device)
    weights = U.diagonal().square().reciprocal()

    def work(rows: slice) -> None:
        target = T[rows].t().clone(memory_format=torch.contiguous_format)
        chosen = torch.empty(target.shape, dtype=torch.uint8, device=T.device)
        # No further than a block: the next one's absmax is searched in what this one passes on.
        for columns in _chunks(T.shape[1], min(_COLUMNS, grid.block_size)):
            if free and columns.start % grid.block_size == 0:
                block = slice(columns.start, columns.start + grid.block_size)
                found = _search(target[block], weights[block], grid)
                first = columns.start // grid.block_size
                absmax.view(T.shape[0], -1)[rows, first] = found
            scales = grid.scales(absmax, rows, columns)
            errors = _pass_on(target[columns], scales, U[columns, columns], grid, chosen[columns])
            target[columns.stop :].addmm_(U[columns, columns.stop :].t(), errors, alpha=-1)
        indices[rows] = chosen.t()

    _for_rows(work, T)
    return Rounding(indices, absmax)


def _pass_on(target: Tensor, scales: Tensor, U: Tensor, grid: Grid, chosen: Tensor) -> Tensor:
    """Round some columns, passing errors on among them; returns the errors for all the others."""
    if kernels := _kernels(target, grid):
        return kernels.pass_on(target, scales, U, grid, chosen)
    errors = torch.empty_like(target)
    diagonal = U.diagonal().tolist()
    # Rows are taken apart at once: a view for each would cost more than most of what is done.
    columns = zip(target, scales, errors, chosen, strict=True)
    for j, (value, scale, error, code) in enumerate(columns):
        index = grid.nearest(value / scale)
        code.copy_(index)
        torch.addcmul(value, grid.levels[index], scale, value=-1, out=error).div_(diagonal[j])
        target[j + 1 :].addr_(U[j, j + 1 :], error, alpha=-1)
    return errors


def _search(block: Tensor, weights: Tensor, grid: Grid) -> Tensor:
    """The absmax (rows,) that rounds ``block`` (columns × rows) best in the weighted square."""
    shares = tuple(share / grid.book.outermost for share in _SHARES)
    if kernels := _kernels(block, grid):
        return kernels.search(block, weights, grid, shares, _ROUNDS, _SMALLEST)
    peak = block.abs().amax(dim=0).clamp_(_SMALLEST, grid.largest)
    weights = weights[:, None]
    best, least = peak, torch.full_like(peak, torch.inf)
    for share in shares:
        absmax = grid.possible(peak * share)
        for last in [False] * _ROUNDS + [True]:
            level = grid.levels[grid.nearest(block / absmax)]
            weighted = weights * level
            cross, square = (weighted * block).sum(dim=0), (weighted * level).sum(dim=0)
            # The square of the error without the block's own, which is the same for all.
            cost = absmax * (absmax * square - 2 * cross)
            better = cost < least
            best, least = torch.where(better, absmax, best), torch.where(better, cost, least)
            if not last:
                fitted = grid.possible(cross / square.clamp_min(_SMALLEST))
                absmax = torch.where(grid.usable(fitted), fitted, absmax)
    return best


@torch.no_grad()
def descend(
    T: Tensor, G: Tensor, start: Rounding, grid: Grid, *, sweeps: int, free: bool
) -> Rounding:
    """Improve ``start`` code by code, ``sweeps`` times over; the absmax too if they are free."""
    free = free and grid.aligned
    indices, absmax = torch.empty_like(start.indices), start.absmax.clone()

    def work(rows: slice) -> None:
        chosen = start.indices[rows].t().contiguous()
        rest = T[rows].t().clone(memory_format=torch.contiguous_format)
        for columns in _chunks(T.shape[1]):
            scales = grid.scales(absmax, rows, columns)
            rest[columns] -= grid.levels[chosen[columns].int()] * scales
        for _ in range(sweeps):
            for columns in _chunks(T.shape[1], grid.block_size if free else _COLUMNS):
                scales = grid.scales(absmax, rows, columns)
                slope = G[columns] @ rest
                refit = _descend_columns(
                    rest[columns], slope, scales, G[columns, columns], grid, chosen[columns], free
                )
                if free:
                    absmax.view(T.shape[0], -1)[rows, columns.start // grid.block_size] = refit
        indices[rows] = chosen.t()

    _for_rows(work, T)
    return Rounding(indices, absmax)


def _descend_columns(
    rest: Tensor,
    slope: Tensor,
    scales: Tensor,
    G: Tensor,
    grid: Grid,
    chosen: Tensor,
    free: bool,
) -> Tensor:
    """Some columns' codes, then where it is free their block's absmax, which is returned.

    ``rest`` and ``chosen`` follow. ``slope`` is these columns' part of G·(T − Q)ᵀ, ``rest`` that
    of (T − Q)ᵀ.
    """
    before = slope.clone() if free else slope
    old = grid.levels[chosen.int()] * scales
    moved = torch.empty_like(slope)
    for columns in _chunks(slope.shape[0]):
        part = slope[columns], old[columns], scales[columns], G[columns, columns]
        _improve(*part, grid, chosen[columns], moved[columns])
        after = slice(columns.stop, None)
        slope[after].addmm_(G[after, columns], moved[columns], alpha=-1)
    rest -= moved
    if not free:
        return scales[0]
    level = grid.levels[chosen.int()]
    square = (level * (G @ level)).sum(dim=0)
    step = (level * before.addmm_(G, moved, alpha=-1)).sum(dim=0) / square.clamp_min(_SMALLEST)
    absmax = scales[0] + step
    if grid.rounds:
        absmax = grid.possible(absmax)
        step = absmax - scales[0]
    fits = (square > 0) & grid.usable(absmax)
    rest -= level * torch.where(fits, step, 0.0)
    return torch.where(fits, absmax, scales[0])


def _improve(
    slope: Tensor,
    old: Tensor,
    scales: Tensor,
    G: Tensor,
    grid: Grid,
    chosen: Tensor,
    moved: Tensor,
) -> None:
    """Take column after column to its best code; ``moved`` becomes how far the values went.

    The ``slope`` is followed no further than these columns.
    """
    if kernels := _kernels(slope, grid):
        return kernels.improve(slope, old, scales, G, grid, chosen, moved)
    diagonal = G.diagonal().tolist()
    columns = zip(slope, old, moved, scales, chosen, strict=True)
    for j, (gradient, value, move, scale, code) in enumerate(columns):
        ideal = torch.add(value, gradient, alpha=1 / diagonal[j])
        index = grid.nearest(ideal.div_(scale))
        code.copy_(index)
        torch.mul(grid.levels[index], scale, out=move).sub_(value)
        slope[j + 1 :].addr_(G[j, j + 1 :], move, alpha=-1)


def _kernels(X: Tensor, grid: Grid) -> Any:
    """What does these loops on ``X``'s device as kernels, if anything does."""
    if not X.is_cuda:
        return None
    from loftq_cli.core import cuda_columns

    return cuda_columns if cuda_columns.takes(X, grid) else None


def _for_rows(work: Callable[[slice], None], T: Tensor) -> None:
    """Work on some rows at a time, whatever the number of threads."""
    rows, columns = T.shape
    half = max(-(-rows // 2), _PAYS)  # for two threads, unless there is too little to do
    size = min(max(_PIECE // columns, 64), half) if T.device.type == "cpu" else rows
    each(lambda i: work(slice(i * size, min(i * size + size, rows))), -(-rows // size))


def _chunks(columns: int, size: int = _COLUMNS) -> Iterator[slice]:
    return (slice(start, min(start + size, columns)) for start in range(0, columns, size))
