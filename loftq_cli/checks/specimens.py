"""What the kernel checks are fed with: weights and stored codes in which every case occurs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from loftq_cli.errors import CheckFailed
from loftq_cli.formats import (
    BLOCK_SIZES,
    INTEGER_BITS,
    INTEGER_BLOCK_SIZES,
    NESTED_BLOCK_SIZE,
    WHOLE_ROW,
)

if TYPE_CHECKING:
    from torch import Tensor

    from loftq_cli.core.blockwise import BlockwiseFormat, QuantizedBlockwise
    from loftq_cli.core.integers import IntegerFormat

UPDATE = "pip install -U bitsandbytes; until this check passes, do not trust 4-bit on this device"
# Enough for each of the 61 special values to begin and to end a block.
_BLOCKS = 128
_ROW = 4096


def formats() -> Iterator[tuple[BlockwiseFormat, Any]]:
    from loftq_cli.core.blockwise import SOURCE_DTYPES, BlockwiseFormat

    for quant_type in ("nf4", "fp4"):
        for block_size in BLOCK_SIZES:
            for dtype in SOURCE_DTYPES:
                yield BlockwiseFormat(quant_type, block_size), dtype


def edge_cases(fmt: BlockwiseFormat, dtype: Any) -> Tensor:
    """A weight of 128 blocks with every level, every border between two levels and its two
    neighbours, at the edges of blocks and inside them; absmax at either end; a block of zeros.

    Every other block is scaled by a power of two, so that what lies on a border stays there.
    """
    from loftq_cli.core.codebooks import codebook

    book = codebook(fmt.quant_type)
    special = _special(book.midpoints(), book.level_tensor())
    return _edge_cases(special, 7, 1.0, fmt.block_size).to(dtype)


def integer_formats() -> Iterator[tuple[IntegerFormat, Any]]:
    from loftq_cli.core.blockwise import SOURCE_DTYPES
    from loftq_cli.core.integers import IntegerFormat

    for bits in INTEGER_BITS:
        for block_size in INTEGER_BLOCK_SIZES:
            for dtype in SOURCE_DTYPES:
                yield IntegerFormat(bits, None if block_size == WHOLE_ROW else block_size), dtype


def integer_edge_cases(fmt: IntegerFormat, dtype: Any) -> Tensor:
    """The same for integers, in rows of 4096 where a block is a row.

    The largest value is half a step beyond the highest code, which is what makes a scale of 1.
    """
    import torch

    grid = fmt.grid
    levels = torch.arange(grid.lowest + 1.0, grid.highest + 1.0)
    peak = grid.highest + 0.5
    # An odd number of them, so that each also meets a block with a power of two.
    special = torch.cat((_special(levels - 0.5, levels), torch.tensor([peak])))
    cases = _edge_cases(special, _BLOCKS, peak, fmt.size(_ROW))
    return cases.to(dtype).view(-1, _ROW)


def _special(borders: Tensor, levels: Tensor) -> Tensor:
    import torch

    above, below = torch.nextafter(borders, borders + 1), torch.nextafter(borders, borders - 1)
    return torch.cat((borders, above, below, levels))


def _edge_cases(special: Tensor, stride: int, peak: float, size: int) -> Tensor:
    """Blocks of this size, of values up to ``peak`` before they are scaled; the next ``stride``
    special ones from column to column."""
    import torch

    generator = torch.Generator().manual_seed(size)
    blocks = (torch.rand(_BLOCKS, size, generator=generator) * 1.98 - 0.99) * peak
    number = torch.arange(_BLOCKS)
    columns = 16 if len(special) <= _BLOCKS else 31
    for shift, column in enumerate((0, -1, *range(1, columns))):
        blocks[:, column] = special[(number + stride * shift) % len(special)]
    place = torch.tensor((0, size - 1, size // 2))[number % 3]
    blocks[number, place] = peak * (1.0 - 2.0 * (number // 3 % 2))
    scale = torch.rand(_BLOCKS, generator=generator) + 0.01
    scale[::2] = 2.0 ** (number[::2] % 13 - 8)
    blocks *= scale[:, None]
    blocks[5] = 0.0
    return blocks.view(_BLOCKS // 2, 2 * size)


def all_codes(fmt: BlockwiseFormat, dtype: Any, device: str, double: bool) -> QuantizedBlockwise:
    """A stored weight in which every pair of codes occurs, with scales of many sizes."""
    from dataclasses import replace

    import torch

    from loftq_cli.core.blockwise import QuantizedBlockwise

    generator = torch.Generator().manual_seed(fmt.block_size)
    count = _BLOCKS * fmt.block_size // 2
    packed = torch.arange(count).remainder(256)[torch.randperm(count, generator=generator)]
    nested_absmax = nested_offset = None
    if double:
        absmax = torch.arange(_BLOCKS).mul(2).add(1).to(torch.uint8)
        nested_absmax, nested_offset = torch.tensor([0.37], device=device), 0.5
    else:
        absmax = torch.rand(_BLOCKS, generator=generator) * 2.0 ** (torch.arange(_BLOCKS) % 24 - 20)
        absmax[5] = 0.0
    return QuantizedBlockwise(
        packed.to(device, torch.uint8).view(-1, 1),
        absmax.to(device),
        nested_absmax,
        nested_offset,
        (_BLOCKS // 2, 2 * fmt.block_size),
        replace(fmt, double_quant=double),
        dtype,
    )


def quant_state(stored: QuantizedBlockwise) -> Any:
    """bitsandbytes' description of a weight that the reference stored."""
    import torch
    from bitsandbytes.functional import QuantState

    from loftq_cli.core.codebooks import codebook, dynamic_map

    device = stored.packed.device
    nested: dict[str, Any] = {}
    if stored.nested_absmax is not None:
        nested["offset"] = torch.as_tensor(stored.nested_offset, device=device)
        nested["state2"] = QuantState(
            absmax=stored.nested_absmax,
            blocksize=NESTED_BLOCK_SIZE,
            code=dynamic_map(device),
            dtype=torch.float32,
        )
    return QuantState(
        absmax=stored.absmax,
        shape=torch.Size(stored.shape),
        code=codebook(stored.format.quant_type).level_tensor(device),
        blocksize=stored.format.block_size,
        quant_type=stored.format.quant_type,
        dtype=stored.dtype,
        **nested,
    )


def short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def differs(what: str, kernel: str, reference: str) -> CheckFailed:
    return CheckFailed(
        "the kernel of this device and the reference disagree",
        cause=f"{what}: the kernel says {kernel}, the reference {reference}",
        hint=UPDATE,
    )
