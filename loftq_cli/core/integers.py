"""Symmetric integers with a 16-bit scale for every block of a row: the readable reference.

    scale[i, b] = 2 · max |w| / (2^bits - 1) over block b of row i
    code[i, j]  = round(w[i, j] / scale), at least -2^(bits - 1) and at most 2^(bits - 1) - 1
    Q[i, j]     = code[i, j] · scale, in float32, then rounded to the dtype of the runtime

That scale is compressed-tensors' and GPTQ's own for a symmetric weight. With a search the scales
are those of ``absmax.py``, which leave less and may be negative. Their codes and scales mean the
same in both, and both runtimes compute the line above: the first stores scales in the model's
dtype, the second in float16. So here each is a value that bfloat16 and float16 both hold exactly,
whatever the dtype of the source, and both files are the same Q. (A code has at most eight
significant bits and a scale too: the float32 product is exact.)

The scale of a block all of whose values are nearer to 0 than that can tell is 0, and its codes are.
Values beyond 65280 are cut off there. No model has either in numbers that matter.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.core.absmax import search_absmax
from loftq_cli.core.blockwise import check_weight
from loftq_cli.core.codebooks import LARGEST_SCALE, IntegerGrid
from loftq_cli.errors import InvalidSetting

# Work goes by about this many values, so that no temporary grows with the weight: 4 MiB of float32.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class IntegerFormat:
    """How a weight is stored in integers."""

    bits: int  # 2, 3, 4 or 8
    block_size: int | None = None  # values of a row that share a scale; None: the whole row

    def __post_init__(self) -> None:
        IntegerGrid(self.bits)
        if self.block_size is not None and self.block_size < 1:
            raise InvalidSetting(f"a block size of {self.block_size} is not possible")

    @property
    def grid(self) -> IntegerGrid:
        return IntegerGrid(self.bits)

    def size(self, in_features: int) -> int:
        """Values in a block, in rows of so many.

        Raises:
            InvalidSetting: the rows do not end where blocks end.
        """
        size = self.block_size or in_features
        if in_features % size:
            raise InvalidSetting(f"rows of {in_features} values are not whole blocks of {size}")
        return size

    @property
    def largest_scale(self) -> float:
        """The largest with which no value outgrows float16, in which GPTQ's runtime multiplies."""
        return LARGEST_SCALE / -self.grid.lowest


@dataclass(frozen=True)
class QuantizedIntegers:
    """Codes and scales before a container packs them, and how to read them."""

    codes: Tensor  # int8 (out, in)
    scales: Tensor  # float32 (out, blocks a row), in bfloat16 and in float16 the same
    format: IntegerFormat
    dtype: torch.dtype  # what the runtime dequantizes to

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])


@torch.no_grad()
def quantize_integers(
    W: Tensor,
    fmt: IntegerFormat,
    *,
    dtype: torch.dtype | None = None,
    search: bool = False,
    previous: Tensor | None = None,
) -> QuantizedIntegers:
    """The integers nearest to ``W`` (out × in), on ``W``'s device.

    With a ``search`` for each block's scale, which begins with the ``previous`` ones
    (out × blocks a row) if given. ``dtype`` is the one that the stored weight is to dequantize to,
    ``W``'s own unless given. Temporaries stay at a few chunks.

    Raises:
        InvalidSetting: ``W`` is no matrix of a dtype for weights, or of rows that end in blocks.
    """
    check_weight(W)
    size, grid, dtype = fmt.size(W.shape[1]), fmt.grid, dtype or W.dtype
    largest = fmt.largest_scale
    codes = torch.empty(W.shape, dtype=torch.int8, device=W.device)
    scales = torch.empty(W.shape[0], W.shape[1] // size, device=W.device)
    for rows in _chunks(W.shape):
        blocks = W[rows].float().reshape(-1, size)
        if search:
            around = None if previous is None else previous[rows].reshape(-1)
            scale = search_absmax(blocks, around, grid, largest)
        else:
            scale = grid.possible(blocks.abs().amax(dim=1) * grid.plain_share, largest)
        reciprocal = torch.where(scale == 0, 0.0, 1.0 / scale)
        codes[rows] = grid.nearest(blocks * reciprocal[:, None]).view(codes[rows].shape)
        scales[rows] = scale.view(scales[rows].shape)
    return QuantizedIntegers(codes, scales, fmt, dtype)


@torch.no_grad()
def dequantize_integers(q: QuantizedIntegers) -> Tensor:
    """The weight that the runtime computes with: ``q.shape``, ``q.dtype``."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.codes.device)
    size = q.format.size(q.shape[1])
    for rows in _chunks(q.shape):
        blocks = q.codes[rows].float().view(-1, size)
        out[rows] = blocks.mul_(q.scales[rows].reshape(-1, 1)).view(-1, q.shape[1])
    return out


def _chunks(shape: tuple[int, int]) -> Iterator[slice]:
    rows = max(_CHUNK // shape[1], 1)
    return (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))
