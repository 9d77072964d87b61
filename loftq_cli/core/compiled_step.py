"""One step of the alternation in one pass over the weight, on the CPU.

A few rows at a time, while they are in cache: their part of the low-rank product, their codes and
absmax, what the codes leave, and its product with the directions that the next SVD starts from.
Only codes and residual are ever whole. The codes and absmax of a given target, and what they
leave, are those of ``blockwise.py``, bit for bit.

The SVD does not need the residual in float32. Rounding it to bfloat16 is noise of a thousandth of
its size and costs a millionth of the energy that the low rank captures; where the processor
multiplies bfloat16 matrices natively that is four times faster, and half the memory.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loftq_cli.core import kernels, search_kernels
from loftq_cli.core.absmax import COLD, WARM, largest_absmax
from loftq_cli.core.blockwise import (
    BlockwiseFormat,
    QuantizedBlockwise,
    double_quantize,
    restore_absmax,
)
from loftq_cli.core.codebooks import codebook
from loftq_cli.core.parallel import all_threads, each
from loftq_cli.core.residual import Residual, rows_a_piece

_ROUNDING = {
    torch.float32: kernels.FLOAT32,
    torch.bfloat16: kernels.BFLOAT16,
    torch.float16: kernels.FLOAT16,
}


@lru_cache(maxsize=1)
def product_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, else float32."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        if getattr(torch.cpu, name, bool)():
            return torch.bfloat16
    return torch.float32


def step(
    W: Tensor,
    carried: tuple[Tensor, Tensor] | None,
    fmt: BlockwiseFormat,
    dtype: torch.dtype,
    *,
    search: bool = False,
    previous: Tensor | None = None,
    products: torch.dtype = torch.float32,
    probe: Tensor | None = None,
    spare: Residual | None = None,
) -> tuple[QuantizedBlockwise, Residual]:
    """The codes of W − left · right and what they leave of W, held in the dtype ``products``.

    The absmax are bitsandbytes' own, or searched for, from the ``previous`` ones if given.
    """
    pieces = _Pieces(W, fmt)
    packed = _empty(((W.numel() + 1) // 2,), torch.uint8)
    absmax = _empty((-(-W.numel() // fmt.block_size),), torch.float32)
    nothing = torch.empty(0, dtype=products)
    left, right = (None, None) if carried is None else (part.to(products) for part in carried)
    choices = _choices(fmt.quant_type, fmt.bits)
    starts = COLD if previous is None else WARM
    factors = np.array(starts.factors, np.float32)
    around = (torch.empty(0) if previous is None else previous).numpy()
    largest = np.float32(largest_absmax(dtype))
    # Double-quantized, what will be read back is not known before the last block.
    twice = search and fmt.double_quant
    residual = None if fmt.double_quant else _in_the_making(pieces, products, probe, spare)

    def work(piece: int, scales: Tensor, *, find: bool, encode: bool) -> None:
        rows, blocks = pieces.rows(piece), pieces.blocks(piece)
        w = _flat(pieces.weight(piece))
        product = _flat(nothing if left is None else left[rows] @ right)
        scale = scales[blocks].numpy()
        if find:
            begin = around[blocks], factors, starts.passes, largest
            search_kernels.search(w, product, fmt.block_size, *choices[:2], *begin, scale)
        if not encode:
            return
        rest = nothing if residual is None else residual.place(piece)
        part = packed[pieces.bytes(piece)].numpy()
        into = _ROUNDING[dtype], part, scale, _flat(rest)
        energy = kernels.quantize(w, product, fmt.block_size, *choices, search, *into)
        if residual is not None:
            residual.finish(piece, rest, energy)

    each(lambda piece: work(piece, absmax, find=search, encode=not twice), pieces.count)
    with all_threads():
        stored = double_quantize(absmax, fmt)
    shape = (W.shape[0], W.shape[1])
    quantized = QuantizedBlockwise(packed.view(-1, 1), *stored, shape, fmt, dtype)
    if twice:
        residual = _in_the_making(pieces, products, probe, spare)
        absmax = restore_absmax(quantized)
        each(lambda piece: work(piece, absmax, find=False, encode=True), pieces.count)
    if residual is None:
        return quantized, leave(W, quantized, products=products, probe=probe, spare=spare)
    return quantized, residual.of(quantized)


def leave(
    W: Tensor,
    quantized: QuantizedBlockwise,
    *,
    products: torch.dtype = torch.float32,
    probe: Tensor | None = None,
    spare: Residual | None = None,
) -> Residual:
    """W − Q of what is already quantized."""
    pieces = _Pieces(W, quantized.format)
    residual = _in_the_making(pieces, products, probe, spare)
    read = _reader(pieces, quantized)

    def work(piece: int) -> None:
        rest = residual.place(piece)
        residual.finish(piece, rest, read(piece, rest))

    each(work, pieces.count)
    return residual.of(quantized)


def remainder(W: Tensor, quantized: QuantizedBlockwise, left: Tensor, right: Tensor) -> float:
    """‖W − Q − left · right‖², the product in float32 and the sum in float64."""
    pieces = _Pieces(W, quantized.format)
    energies = [0.0] * pieces.count
    read = _reader(pieces, quantized)

    def work(piece: int) -> None:
        part = left[pieces.rows(piece)]
        rest = torch.empty(part.shape[0], right.shape[1])
        read(piece, rest)
        energies[piece] = kernels.sum_of_squares(_flat(rest.addmm_(part, right, alpha=-1)))

    each(work, pieces.count)
    return math.fsum(energies)


class _Pieces:
    """A weight in runs of rows that end where blocks end."""

    def __init__(self, W: Tensor, fmt: BlockwiseFormat) -> None:
        out_features, self.columns = W.shape
        self.W = W
        self.block_size = fmt.block_size
        whole = self.block_size // math.gcd(self.columns, self.block_size)
        self.height = rows_a_piece(out_features, self.columns, math.lcm(whole, 16))
        self.count = -(-out_features // self.height)

    def rows(self, piece: int) -> slice:
        return slice(piece * self.height, min((piece + 1) * self.height, self.W.shape[0]))

    def weight(self, piece: int) -> Tensor:
        return self.W[self.rows(piece)].float().contiguous()

    def bytes(self, piece: int) -> slice:
        rows = self.rows(piece)
        return slice(rows.start * self.columns // 2, (rows.stop * self.columns + 1) // 2)

    def blocks(self, piece: int) -> slice:
        rows = self.rows(piece)
        return slice(
            rows.start * self.columns // self.block_size,
            -(-rows.stop * self.columns // self.block_size),
        )


class _InTheMaking:
    """A residual in the making, held in ``matrix``."""

    def __init__(self, pieces: _Pieces, matrix: Tensor, probe: Tensor | None) -> None:
        self.pieces = pieces
        self.matrix = matrix
        self.energies = [0.0] * pieces.count
        self.probe = probe
        self.directions: Tensor | None = None
        self.probed: Tensor | None = None
        if probe is not None:
            self.directions = probe.to(matrix.dtype)
            self.probed = _empty((pieces.W.shape[0], probe.shape[1]), matrix.dtype)

    def place(self, piece: int) -> Tensor:
        """Where the rows of this piece go."""
        return self.matrix[self.pieces.rows(piece)]

    def finish(self, piece: int, rest: Tensor, energy: float) -> None:
        """The rows of this piece are in ``rest``, and their squares add up to ``energy``."""
        self.energies[piece] = energy
        if self.directions is not None and self.probed is not None:
            torch.mm(rest, self.directions, out=self.probed[self.pieces.rows(piece)])

    def of(self, quantized: QuantizedBlockwise) -> Residual:
        W = self.pieces.W
        rounded = self.matrix.dtype != torch.float32
        reread = partial(leave, W, quantized) if rounded else None
        return Residual(self.matrix, math.fsum(self.energies), self.probe, self.probed, reread)


def _in_the_making(
    pieces: _Pieces, dtype: torch.dtype, probe: Tensor | None, spare: Residual | None
) -> _InTheMaking:
    """In ``spare``'s memory if that fits."""
    shape = (pieces.W.shape[0], pieces.columns)
    fits = spare is not None and spare.shape == shape and spare.matrix.dtype == dtype
    matrix = spare.matrix if spare is not None and fits else _empty(shape, dtype)
    return _InTheMaking(pieces, matrix, probe)


def _reader(pieces: _Pieces, q: QuantizedBlockwise) -> Callable[[int, Tensor], float]:
    """A function that writes W − Q of a piece and returns its square."""
    packed, absmax = q.packed.view(-1), restore_absmax(q)
    levels = codebook(q.format.quant_type).level_tensor().numpy()

    def read(piece: int, out: Tensor) -> float:
        energy: float = kernels.leave(
            _flat(pieces.weight(piece)),
            packed[pieces.bytes(piece)].numpy(),
            absmax[pieces.blocks(piece)].numpy(),
            q.format.block_size,
            levels,
            _ROUNDING[q.dtype],
            _flat(out),
        )
        return energy

    return read


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory from numpy, which asks for huge pages: five times cheaper to touch first."""
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.empty(size, np.uint8)).view(dtype).view(shape)


def _flat(matrix: Tensor) -> Any:
    """A one-dimensional numpy view; bfloat16 as its bits in uint16."""
    flat = matrix.view(-1)
    return (flat if flat.dtype == torch.float32 else flat.view(torch.uint16)).numpy()


@lru_cache(maxsize=8)
def _choices(
    quant_type: str, bits: int
) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """Borders, levels and codes in ascending order, as the kernels want them: always sixteen.

    Fewer are filled up on either side, behind borders that nothing is below or above, so that the
    zero is where that of sixteen is: the eighth.
    """
    book = codebook(quant_type, bits)
    levels = book.level_tensor()[list(book.order)]
    before = 7 - levels.tolist().index(0.0)
    after = 16 - len(book.order) - before
    borders = book.midpoints().numpy()
    return (
        tuple(np.pad(borders, (before, after), constant_values=(-np.inf, np.inf))),
        tuple(np.pad(levels.numpy(), (before, after), mode="edge")),
        tuple(np.pad(book.order_tensor().numpy(), (before, after), mode="edge")),
    )
