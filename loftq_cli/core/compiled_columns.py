"""The column loops of ``gptq.py`` on a CPU: compiled, with the arguments of ``columns.py``."""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from loftq_cli.core import column_kernels as kernels
from loftq_cli.core.codebooks import Codebook, Levels
from loftq_cli.core.layouts import choices, sixteen

if TYPE_CHECKING:
    from loftq_cli.core.gptq import Grid


def pass_on(target: Tensor, scales: Tensor, U: Tensor, grid: "Grid", chosen: Tensor) -> Tensor:
    """``columns.pass_on``."""
    values = torch.empty_like(target)
    into = chosen.numpy(), values.numpy()
    kernels.pass_on(*_arrays(target, scales, U), *_tables(grid.book), *into)
    return values


def improve(
    slope: Tensor, scales: Tensor, G: Tensor, grid: "Grid", chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """``columns.improve``."""
    moved, level = torch.empty_like(slope), torch.empty_like(slope)
    into = chosen.numpy(), moved.numpy(), level.numpy()
    kernels.improve(*_arrays(slope, scales, G, grid.levels), *_tables(grid.book), *into)
    return moved, level


def search(
    block: Tensor,
    weights: Tensor,
    grid: "Grid",
    shares: tuple[float, ...],
    rounds: int,
    smallest: float,
) -> Tensor:
    """``columns.search``."""
    found = torch.empty(block.shape[1])
    limits = (np.float32(number) for number in (grid.unit, grid.most, grid.largest, smallest))
    starts = np.array(shares, np.float32), rounds
    tables = _tables(grid.book)[:2]
    kernels.search(*_arrays(block, weights), *tables, *starts, *limits, found.numpy())
    return found


def _arrays(*tensors: Tensor) -> list[Any]:
    return [tensor.contiguous().numpy() for tensor in tensors]


@lru_cache(maxsize=8)
def _tables(levels: Levels) -> tuple[Any, Any, Any]:
    """Borders, levels and indices as the kernels want them."""
    if isinstance(levels, Codebook):
        indices = np.arange(len(levels.order), dtype=np.int32)
        return (*choices(levels)[:2], sixteen(levels, indices))
    return None, (np.float32(levels.lowest), np.float32(levels.highest)), None
