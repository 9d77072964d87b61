"""The column loops of ``gptq.py``, launched on CUDA: a kernel each, with the
arguments of ``columns.py``."""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loftq_cli.core.codebooks import Levels
from loftq_cli.core.cuda_step import LONGEST, NO_CONTRACTION, TILE, obstacle, tables, warps, width

if TYPE_CHECKING:
    from loftq_cli.core.gptq import Grid

# Rows that one program takes through a piece of columns: so few that all of a GPU has some.
_ROWS = 16


def takes(X: Tensor, grid: "Grid") -> bool:
    """Whether the kernels work on ``X`` and on blocks of this size."""
    return X.is_cuda and grid.block_size <= LONGEST and obstacle(X.device) is None


def pass_on(target: Tensor, scales: Tensor, U: Tensor, grid: "Grid", chosen: Tensor) -> Tensor:
    """``columns.pass_on``."""
    from loftq_cli.core import triton_columns as kernels

    columns, rows = target.shape
    values = torch.empty(columns, rows, device=target.device)
    strides = target.stride(0), chosen.stride(0), *U.stride()
    with torch.cuda.device_of(target):
        kernels.pass_on[(-(-rows // _ROWS),)](
            target, scales.contiguous(), U, chosen, values, columns, rows, *strides,
            COLUMNS=width(columns), ROWS=_ROWS, **_tables(grid.book), num_warps=1, **NO_CONTRACTION
        )  # fmt: skip
    return values


def improve(
    slope: Tensor, scales: Tensor, G: Tensor, grid: "Grid", chosen: Tensor
) -> tuple[Tensor, Tensor]:
    """``columns.improve``."""
    from loftq_cli.core import triton_columns as kernels

    columns, rows = slope.shape
    scales = scales.contiguous()
    old = grid.levels[chosen.int()] * scales
    moved = torch.empty(columns, rows, device=slope.device)
    strides = slope.stride(0), chosen.stride(0), moved.stride(0), *G.stride()
    with torch.cuda.device_of(slope):
        kernels.improve[(-(-rows // _ROWS),)](
            slope, old, scales, G, chosen, moved, columns, rows, *strides,
            COLUMNS=width(columns), ROWS=_ROWS, **_tables(grid.book), num_warps=1, **NO_CONTRACTION
        )  # fmt: skip
    return moved, grid.levels[chosen.int()]


def search(
    block: Tensor,
    weights: Tensor,
    grid: "Grid",
    shares: tuple[float, ...],
    rounds: int,
    smallest: float,
) -> Tensor:
    """``columns.search``."""
    from loftq_cli.core import triton_columns as kernels

    columns, rows = block.shape
    found = torch.empty(rows, device=block.device)
    across = width(columns)
    a_program = max(TILE // across, 1)
    constants = _tables(grid.book)
    with torch.cuda.device_of(block):
        kernels.search[(-(-rows // a_program),)](
            block, weights, _shares(shares, block.device), found, len(shares), rounds,
            grid.unit, grid.most, grid.largest, smallest, columns, rows, block.stride(0),
            BORDERS=constants["BORDERS"], LEVELS=constants["LEVELS"],
            COLUMNS=across, ROWS=a_program, num_warps=warps(across), **NO_CONTRACTION
        )  # fmt: skip
    return found


@lru_cache(maxsize=8)
def _shares(shares: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(shares, device=device)


def _tables(levels: Levels) -> dict[str, Any]:
    """What is compiled into the kernels."""
    constants = tables(levels)
    indices = tuple(range(len(constants["LEVELS"])))
    return {"BORDERS": constants["BORDERS"], "LEVELS": constants["LEVELS"], "INDICES": indices}
