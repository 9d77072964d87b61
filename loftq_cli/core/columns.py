"""The column loops of ``gptq.py``, readable: what the compiled ones are held to.

All tensors are (columns × rows). A column is worked on for all rows at once, and what it does to
others is followed no further than the columns that are given.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from loftq_cli.core.gptq import Grid


def pass_on(target: Tensor, scales: Tensor, U: Tensor, grid: "Grid", chosen: Tensor) -> Tensor:
    """Round column after column, and pass what that did wrong on to those after it.

    ``chosen`` becomes the codes; the values that they stand for are returned.
    """
    target, values = target.clone(), torch.empty_like(target)
    diagonal = U.diagonal().tolist()
    # Rows are taken apart at once: a view for each would cost more than most of what is done.
    columns = zip(target, values, scales, chosen, strict=True)
    for j, (ideal, value, scale, code) in enumerate(columns):
        index = grid.nearest(ideal / scale)
        code.copy_(index)
        torch.mul(grid.levels[index], scale, out=value)
        error = (ideal - value).div_(diagonal[j])
        target[j + 1 :].addr_(U[j, j + 1 :], error, alpha=-1)
    return values


def improve(
    slope: Tensor, scales: Tensor, G: Tensor, grid: "Grid", chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """Take column after column to the code that is best while all others stay.

    ``slope`` is G·(T − Q)ᵀ, and ``chosen`` are the codes of Qᵀ, before and after. Returned are how
    far the values moved, and the levels where they are now.
    """
    slope, moved, level = slope.clone(), torch.empty_like(slope), torch.empty_like(slope)
    old = grid.levels[chosen.int()] * scales
    diagonal = G.diagonal().tolist()
    columns = zip(slope, old, moved, level, scales, chosen, strict=True)
    for j, (gradient, value, move, now, scale, code) in enumerate(columns):
        ideal = torch.add(value, gradient, alpha=1 / diagonal[j])
        index = grid.nearest(ideal.div_(scale))
        code.copy_(index)
        now.copy_(grid.levels[index])
        torch.mul(now, scale, out=move).sub_(value)
        slope[j + 1 :].addr_(G[j, j + 1 :], move, alpha=-1)
    return moved, level


def search(
    block: Tensor,
    weights: Tensor,
    grid: "Grid",
    shares: tuple[float, ...],
    rounds: int,
    smallest: float,
) -> Tensor:
    """The absmax (rows,) that rounds each row of a block best in the weighted square.

    It is looked for at these ``shares`` of the largest magnitude, each improved ``rounds`` times.
    """
    peak = block.abs().amax(dim=0).clamp_(smallest, grid.largest)
    weights = weights[:, None]
    best, least = peak, torch.full_like(peak, torch.inf)
    for share in shares:
        absmax = grid.possible(peak * share)
        for last in [False] * rounds + [True]:
            level = grid.levels[grid.nearest(block / absmax)]
            weighted = weights * level
            cross, square = (weighted * block).sum(dim=0), (weighted * level).sum(dim=0)
            # The square of the error without the block's own, which is the same for all.
            cost = absmax * (absmax * square - 2 * cross)
            better = cost < least
            best, least = torch.where(better, absmax, best), torch.where(better, cost, least)
            if not last:
                fitted = grid.possible(cross / square.clamp_min(smallest))
                absmax = torch.where(grid.usable(fitted), fitted, absmax)
    return best
