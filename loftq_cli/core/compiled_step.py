"""One step of the alternation in one pass over the weight, on the CPU.

A few rows at a time, while they are in cache: their part of the low-rank product, their codes and
absmax, what the codes leave, and its product with the directions that the next SVD starts from.
Only codes and residual are ever whole. The codes and absmax (for integers: scales) of a given
target, and what they leave, are those of ``blockwise.py`` and ``integers.py``, bit for bit.

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

from loftq_cli.core import kernels
from loftq_cli.core.blockwise import BlockwiseFormat
from loftq_cli.core.extrapolation import Extrapolation
from loftq_cli.core.integers import IntegerFormat
from loftq_cli.core.layouts import Layout, flat, layout
from loftq_cli.core.parallel import each
from loftq_cli.core.residual import Residual, rows_a_piece
from loftq_cli.core.steps import Factors


@lru_cache(maxsize=1)
def product_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, else float32."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        if getattr(torch.cpu, name, bool)():
            return torch.bfloat16
    return torch.float32


class CompiledSteps:
    """The steps of :class:`steps.ReferenceSteps` for codes in blocks, compiled.

    The absmax, or scales, are searched for, or the format's own. The residual is held in the dtype
    ``products``, and each step's in the memory of the one before.
    """

    def __init__(
        self,
        W: Tensor,
        fmt: BlockwiseFormat | IntegerFormat,
        dtype: torch.dtype,
        *,
        search: bool = False,
        products: torch.dtype = torch.float32,
    ) -> None:
        """``dtype`` is what the runtime dequantizes to."""
        self.W = W
        self.layout = layout(fmt, (W.shape[0], W.shape[1]), dtype)
        self.search = search
        self.products = products
        self._memory: Tensor | None = None

    def quantize(
        self,
        carried: Factors | None = None,
        like: Any = None,
        extrapolation: Extrapolation | None = None,
    ) -> tuple[Any, Residual]:
        W, form = self.W, self.layout
        pieces = _Pieces(W, form)
        codes = _empty((form.codes(slice(0, W.numel())).stop,), form.code_dtype)
        scales = _empty((-(-W.numel() // form.block_size),), torch.float32)
        nothing = torch.empty(0, dtype=self.products)
        left, right = (part.to(self.products) for part in carried[:2]) if carried else (None, None)
        around = None if like is None else form.parts(like)[1]

        def work(
            piece: int, scales: Tensor, residual: _PartialResidual | None, *, find: bool, code: bool
        ) -> None:
            rows, blocks = pieces.rows(piece), pieces.blocks(piece)
            w = flat(pieces.weight(piece))
            carries = nothing if left is None else left[rows] @ right
            if left is not None and extrapolation is not None:
                carries = extrapolation.aim(rows, carries, remember=code)
            product = flat(carries)
            if find:
                previous = None if around is None else around[blocks]
                form.search(w, product, previous, scales[blocks])
            if not code:
                return
            rest = flat(nothing if residual is None else residual.rows(piece))
            part = codes[pieces.codes(piece)]
            energy = form.quantize(w, product, part, scales[blocks], rest, given=self.search)
            if residual is not None:
                residual.finish(piece, energy)

        # Rounded all together, what will be read back is not known before the last block: then
        # absmax that were searched for get their codes, and others their residual, in a second
        # pass.
        together = form.rounds_together
        residual = None if together else self._residual(pieces, carried)
        code = not (self.search and together)
        each(lambda i: work(i, scales, residual, find=self.search, code=code), pieces.count)
        quantized = form.stored(codes, scales)
        if residual is None:
            residual = self._residual(pieces, carried)
            if self.search:
                restored = form.parts(quantized)[1]
                each(lambda i: work(i, restored, residual, find=False, code=True), pieces.count)
            else:
                residual.form(quantized)
        return quantized, residual.of(quantized)

    def remainder(self, quantized: Any, carried: Factors) -> float:
        pieces = _Pieces(self.W, self.layout)
        energies = [0.0] * pieces.count
        read = pieces.reader(quantized)

        def work(piece: int) -> None:
            part = carried.left[pieces.rows(piece)]
            rest = torch.empty(part.shape[0], carried.right.shape[1])
            read(piece, rest)
            rest.addmm_(part, carried.right, alpha=-1)
            energies[piece] = kernels.sum_of_squares(flat(rest))

        each(work, pieces.count)
        return math.fsum(energies)

    def _residual(self, pieces: "_Pieces", carried: Factors | None) -> "_PartialResidual":
        """Of this step, its memory taken from the last one's."""
        if self._memory is None:
            self._memory = _empty(tuple(self.W.shape), self.products)
        return _PartialResidual(pieces, self._memory, carried.subspace if carried else None)


def residual_of(W: Tensor, quantized: Any, products: torch.dtype = torch.float32) -> Residual:
    """W − Q of what is already quantized."""
    form = layout(quantized.format, quantized.shape, quantized.dtype)
    residual = _PartialResidual(_Pieces(W, form), _empty(tuple(W.shape), products), None)
    residual.form(quantized)
    return residual.of(quantized)


class _Pieces:
    """A weight in runs of rows that end where blocks end."""

    def __init__(self, W: Tensor, form: Layout) -> None:
        out_features, self.columns = W.shape
        self.W = W
        self.layout = form
        whole = form.block_size // math.gcd(self.columns, form.block_size)
        self.height = rows_a_piece(out_features, self.columns, math.lcm(whole, 16))
        self.count = -(-out_features // self.height)

    def rows(self, piece: int) -> slice:
        return slice(piece * self.height, min((piece + 1) * self.height, self.W.shape[0]))

    def weight(self, piece: int) -> Tensor:
        return self.W[self.rows(piece)].float().contiguous()

    def codes(self, piece: int) -> slice:
        rows = self.rows(piece)
        return self.layout.codes(slice(rows.start * self.columns, rows.stop * self.columns))

    def blocks(self, piece: int) -> slice:
        rows, size = self.rows(piece), self.layout.block_size
        return slice(rows.start * self.columns // size, -(-rows.stop * self.columns // size))

    def reader(self, quantized: Any) -> Callable[[int, Tensor], float]:
        """A function that writes W − Q of a piece and returns its square."""
        codes, scales = self.layout.parts(quantized)

        def read(piece: int, out: Tensor) -> float:
            stored = codes[self.codes(piece)], scales[self.blocks(piece)]
            return self.layout.leave(flat(self.weight(piece)), *stored, flat(out))

        return read


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

    def form(self, quantized: Any) -> None:
        """All of it, from what is stored."""
        read = self.pieces.reader(quantized)
        each(lambda piece: self.finish(piece, read(piece, self.rows(piece))), self.pieces.count)

    def of(self, quantized: Any) -> Residual:
        """Complete: of the weight that was ``quantized``."""
        rounded = self.matrix.dtype != torch.float32
        reread = partial(residual_of, self.pieces.W, quantized) if rounded else None
        energy = math.fsum(self.energies)
        return Residual(self.matrix, energy, self.probe, self.probed, reread)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory from numpy, which asks for huge pages: five times cheaper to touch first."""
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.empty(size, np.uint8)).view(dtype).view(shape)
