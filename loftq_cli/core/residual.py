"""What a quantization leaves, W − Q, as the SVD sees it: a norm, and products from either side."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from loftq_cli.core.parallel import each
from loftq_cli.core.sketches import COLUMNS, PIECE
from loftq_cli.core.transfers import fetch

# Below this many values, loading the compiled kernels costs more than they save.
_WORTH_COMPILING = 1 << 16
# So many rows are taken into float64 at a time.
_ROWS = 256


class Sketch(NamedTuple):
    """A residual R multiplied with vectors V from either side: what its SVD is made of."""

    V: Tensor  # (in, k)
    Y: Tensor  # R·V·unit (out, k), in the dtype of the matrix
    Z: Tensor  # Rᵀ·Y·unit (in, k)
    gram_Y: Tensor  # YᵀY (k, k), float64 on the CPU
    gram_Z: Tensor  # ZᵀZ
    unit: float  # about 1 / ‖R‖: it keeps the squares of squares within float32


@dataclass(frozen=True)
class Residual:
    """A matrix R (out × in) in float32, or rounded to bfloat16 for cheaper products."""

    matrix: Tensor
    energy: float  # ‖R‖², before any rounding
    probe: Tensor | None = None  # (in, k): its product is known already
    probed: Tensor | None = None  # (out, k)
    reread: Callable[[], "Residual"] | None = None  # gives the float32 one, if this is not
    known: Sketch | None = None

    @classmethod
    def of(cls, R: Tensor, V: Tensor | None = None, energy: Tensor | None = None) -> "Residual":
        """That of a float32 matrix; of a float64 scalar on its device, if that is its ``energy``.

        A GPU is waited for once, if ``V`` (in × k) is what the SVD will begin with: the sketch is
        made in any case then, and the energy comes with it.
        """
        if energy is None and R.device.type == "cpu":
            return cls(R, sum_of_squares(R))
        energy = _sum_of_squares_there(R) if energy is None else energy
        if V is None:
            return cls(R, float(energy))
        residual = cls(R, math.nan)
        unit = torch.exp2(_exponent(energy))
        Y, Z, *grams = residual._products(V, unit)
        found, size, gram_Y, gram_Z = fetch([energy, unit, *grams])
        known = Sketch(V, Y, Z, gram_Y, gram_Z, float(size))
        return replace(residual, energy=float(found), known=known)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.matrix.shape[0], self.matrix.shape[1])

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    @property
    def is_exact(self) -> bool:
        return self.reread is None

    def exact(self) -> "Residual":
        """The same with a float32 matrix."""
        return self if self.reread is None else self.reread()

    def sketch(self, V: Tensor) -> Sketch:
        """The sketch with V (in × k), of a residual that is not zero. A GPU is waited for once."""
        if self.known is not None and V is self.known.V:
            return self.known
        unit = 2.0 ** int(_exponent(torch.tensor(self.energy, dtype=torch.float64)))
        Y, Z, *grams = self._products(V, unit)
        gram_Y, gram_Z = fetch(grams)
        return Sketch(V, Y, Z, gram_Y, gram_Z, unit)

    def _products(self, V: Tensor, unit: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Y, Z and their Gram matrices. Rounded products are worth no more than float32."""
        Y = self.times(V) * unit
        Z = self.transposed_times(Y) * unit
        dtype = torch.float64 if self.is_exact else torch.float32
        return Y, Z, transposed_times(Y, Y, dtype), transposed_times(Z, Z, dtype)

    def times(self, V: Tensor) -> Tensor:
        """R · V (out × k), for V (in × k), in the dtype of the matrix."""
        if self.probed is not None and V is self.probe:
            return self.probed
        return rows_times(self.matrix, V.to(self.matrix.dtype))

    def transposed_times(self, Y: Tensor) -> Tensor:
        """Rᵀ · Y (in × k), for Y (out × k), in the dtype of the matrix."""
        return rows_times(self.matrix.t(), Y.to(self.matrix.dtype), COLUMNS)


def rows_times(A: Tensor, B: Tensor, rows: int | None = None) -> Tensor:
    """A · B; on the CPU a few rows of A at a time, on all threads."""
    if A.device.type != "cpu":
        return A @ B
    out = B.new_empty(A.shape[0], B.shape[1])
    rows = rows or rows_a_piece(A.shape[0], A.shape[1])

    def multiply(piece: int) -> None:
        part = slice(piece * rows, (piece + 1) * rows)
        torch.mm(A[part], B, out=out[part])

    each(multiply, -(-A.shape[0] // rows))
    return out


def transposed_times(Y: Tensor, Z: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Yᵀ · Z of two tall matrices, in ``dtype``; the parts are added up in float64."""
    rows = rows_a_piece(Y.shape[0], 2048)
    count = -(-Y.shape[0] // rows) if Y.device.type == "cpu" else 1
    parts = torch.empty(count, Y.shape[1], Z.shape[1], dtype=dtype, device=Y.device)

    def multiply(piece: int) -> None:
        part = slice(piece * rows, (piece + 1) * rows) if count > 1 else slice(None)
        torch.mm(Y[part].to(dtype).t(), Z[part].to(dtype), out=parts[piece])

    each(multiply, count)
    return parts.double().sum(0)


def rows_a_piece(rows: int, columns: int, multiple: int = 1) -> int:
    """Rows to work on at a time: about ``PIECE`` values, at least eight pieces where that can be.

    It depends on the shape alone, never on the threads: a product's last bits may depend on it.
    """
    return max(min(PIECE // max(columns, 1), -(-rows // 8)) // multiple, 1) * multiple


def worth_compiling(X: Tensor) -> bool:
    """Whether ``X`` is on the CPU, where the compiled kernels work, and large enough for them."""
    return X.device.type == "cpu" and X.numel() >= _WORTH_COMPILING


@torch.no_grad()
def sum_of_squares(X: Tensor) -> float:
    """‖X‖² in float64."""
    if X.device.type != "cpu":
        return float(_sum_of_squares_there(X))
    if not worth_compiling(X):
        rows = rows_a_piece(X.shape[0], X.shape[1])
        return sum(float(part.double().square().sum()) for part in X.split(rows))
    from loftq_cli.core import kernels

    pieces = X.split(rows_a_piece(X.shape[0], X.shape[1], 16))
    sums = [0.0] * len(pieces)

    def work(piece: int) -> None:
        values = pieces[piece].float().contiguous().view(-1)
        sums[piece] = kernels.sum_of_squares(values.numpy())

    each(work, len(pieces))
    return math.fsum(sums)


def _sum_of_squares_there(X: Tensor) -> Tensor:
    """‖X‖² on a GPU, which would be waited for after every chunk if they were added up here."""
    return torch.linalg.vector_norm(X, dtype=torch.float64).square()


def _exponent(energy: Tensor) -> Tensor:
    """That of the power of two nearest to 1 / ‖R‖: multiplied with it nothing is rounded."""
    return energy.log2().div(2).round().clamp(-126, 126).neg()


def left_by(
    W: Tensor, Q: Tensor, correction: tuple[Tensor, Tensor] | None
) -> tuple[float, float, float]:
    """‖W − Q − B·A‖ / ‖W‖, ‖W − Q‖ / ‖W‖ and ‖W‖ for a correction (B, A) in float64.

    Some rows are looked at at a time.
    """
    left = alone = norm = 0.0
    for start in range(0, W.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        part = W[rows].double()
        norm += float(part.square().sum())
        part -= Q[rows].to(part.device)
        alone += float(part.square().sum())
        if correction is not None:
            B, A = correction
            part.addmm_(B[rows].to(part.device), A.to(part.device), alpha=-1)
        left += float(part.square().sum())
    size = math.sqrt(norm) or 1.0
    return math.sqrt(left) / size, math.sqrt(alone) / size, math.sqrt(norm)
