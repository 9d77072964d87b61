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
from loftq_cli.core.absmax import COLD, WARM
from loftq_cli.core.blockwise import (
    BlockwiseFormat,
    QuantizedBlockwise,
    double_quantize,
    restore_absmax,
)
from loftq_cli.core.codebooks import codebook
from loftq_cli.core.parallel import all_threads, each
from loftq_cli.core.residual import Residual, rows_a_piece
from loftq_cli.core.steps import Factors

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


class CompiledSteps:
    """The steps of :class:`steps.ReferenceSteps` for a blockwise format, compiled.

    The absmax are searched for, or bitsandbytes' own. The residual is held in the dtype
    ``products``, and each step's in the memory of the one before.
    """

    def __init__(
        self,
        W: Tensor,
        fmt: BlockwiseFormat,
        dtype: torch.dtype,
        *,
        search: bool = False,
        products: torch.dtype = torch.float32,
    ) -> None:
        """``dtype`` is what the runtime dequantizes to."""
        self.W = W
        self.format = fmt
        self.dtype = dtype
        self.search = search
        self.products = products
        self._memory: Tensor | None = None

    def quantize(
        self, carried: Factors | None = None, like: QuantizedBlockwise | None = None
    ) -> tuple[QuantizedBlockwise, Residual]:
        W, fmt = self.W, self.format
        pieces = _Pieces(W, fmt)
        packed = _empty(((W.numel() + 1) // 2,), torch.uint8)
        absmax = _empty((-(-W.numel() // fmt.block_size),), torch.float32)
        nothing = torch.empty(0, dtype=self.products)
        left, right = (part.to(self.products) for part in carried[:2]) if carried else (None, None)
        choices = _choices(fmt.quant_type, fmt.bits)
        starts = COLD if like is None else WARM
        factors = np.array(starts.factors, np.float32)
        around = (torch.empty(0) if like is None else restore_absmax(like)).numpy()
        largest = np.float32(torch.finfo(self.dtype).max)

        def work(
            piece: int, scales: Tensor, residual: _PartialResidual | None, *, find: bool, code: bool
        ) -> None:
            rows, blocks = pieces.rows(piece), pieces.blocks(piece)
            w = _flat(pieces.weight(piece))
            product = _flat(nothing if left is None else left[rows] @ right)
            scale = scales[blocks].numpy()
            if find:
                begin = around[blocks], factors, starts.passes, largest
                search_kernels.search(w, product, fmt.block_size, *choices[:2], *begin, scale)
            if not code:
                return
            rest = nothing if residual is None else residual.rows(piece)
            part = packed[pieces.bytes(piece)].numpy()
            into = _ROUNDING[self.dtype], part, scale, _flat(rest)
            energy = kernels.quantize(w, product, fmt.block_size, *choices, self.search, *into)
            if residual is not None:
                residual.finish(piece, energy)

        # Double-quantized, what will be read back is not known before the last block: then absmax
        # that were searched for get their codes, and others their residual, in a second pass.
        residual = None if fmt.double_quant else self._residual(pieces, carried)
        code = not (self.search and fmt.double_quant)
        each(lambda i: work(i, absmax, residual, find=self.search, code=code), pieces.count)
        with all_threads():
            stored = double_quantize(absmax, fmt)
        shape = (W.shape[0], W.shape[1])
        quantized = QuantizedBlockwise(packed.view(-1, 1), *stored, shape, fmt, self.dtype)
        if residual is None:
            residual = self._residual(pieces, carried)
            if self.search:
                restored = restore_absmax(quantized)
                each(lambda i: work(i, restored, residual, find=False, code=True), pieces.count)
            else:
                residual.form(quantized)
        return quantized, residual.of(quantized)

    def remainder(self, quantized: QuantizedBlockwise, carried: Factors) -> float:
        pieces = _Pieces(self.W, quantized.format)
        energies = [0.0] * pieces.count
        read = _reader(pieces, quantized)

        def work(piece: int) -> None:
            part = carried.left[pieces.rows(piece)]
            rest = torch.empty(part.shape[0], carried.right.shape[1])
            read(piece, rest)
            rest.addmm_(part, carried.right, alpha=-1)
            energies[piece] = kernels.sum_of_squares(_flat(rest))

        each(work, pieces.count)
        return math.fsum(energies)

    def _residual(self, pieces: "_Pieces", carried: Factors | None) -> "_PartialResidual":
        """Of this step, its memory taken from the last one's."""
        if self._memory is None:
            self._memory = _empty(tuple(self.W.shape), self.products)
        return _PartialResidual(pieces, self._memory, carried.subspace if carried else None)


def residual_of(
    W: Tensor, quantized: QuantizedBlockwise, products: torch.dtype = torch.float32
) -> Residual:
    """W − Q of what is already quantized."""
    pieces = _Pieces(W, quantized.format)
    residual = _PartialResidual(pieces, _empty(tuple(W.shape), products), None)
    residual.form(quantized)
    return residual.of(quantized)


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


class _PartialResidual:
    """A residual while its pieces are formed, in ``matrix``, and multiplied with ``probe``."""

    def __init__(self, pieces: _Pieces, matrix: Tensor, probe: Tensor | None) -> None:
        self.pieces = pieces
        self.matrix = matrix
        self.energies = [0.0] * pieces.count
        self.probe = probe
        self.directions: Tensor | None = None
        self.probed: Tensor | None = None
        if probe is not None:
            self.directions = probe.to(matrix.dtype)
            self.probed = _empty((matrix.shape[0], probe.shape[1]), matrix.dtype)

    def rows(self, piece: int) -> Tensor:
        """Where the rows of this piece go."""
        return self.matrix[self.pieces.rows(piece)]

    def finish(self, piece: int, energy: float) -> None:
        """The rows of this piece are there, and their squares add up to ``energy``."""
        self.energies[piece] = energy
        if self.directions is not None and self.probed is not None:
            rows = self.pieces.rows(piece)
            torch.mm(self.matrix[rows], self.directions, out=self.probed[rows])

    def form(self, quantized: QuantizedBlockwise) -> None:
        """All of it, from what is stored."""
        read = _reader(self.pieces, quantized)
        each(lambda piece: self.finish(piece, read(piece, self.rows(piece))), self.pieces.count)

    def of(self, quantized: QuantizedBlockwise) -> Residual:
        """Complete: of the weight that was ``quantized``."""
        rounded = self.matrix.dtype != torch.float32
        reread = partial(residual_of, self.pieces.W, quantized) if rounded else None
        energy = math.fsum(self.energies)
        return Residual(self.matrix, energy, self.probe, self.probed, reread)


def _reader(pieces: _Pieces, q: QuantizedBlockwise) -> Callable[[int, Tensor], float]:
    """A function that writes W − Q of a piece and returns its square."""
    packed, absmax = q.packed.view(-1), restore_absmax(q)
    levels = codebook(q.format.quant_type).level_tensor().numpy()

    def read(piece: int, out: Tensor) -> float:
        energy: float = kernels.form_residual(
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
