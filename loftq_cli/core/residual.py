"""What a quantization leaves, W − Q, as the SVD sees it: a norm, and products from either side."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.core.parallel import each
from loftq_cli.core.sketches import COLUMNS, PIECE

# Below this many values, loading the compiled kernels costs more than they save.
_WORTH_COMPILING = 1 << 16


@dataclass(frozen=True)
class Residual:
    """A matrix R (out × in) in float32, or rounded to bfloat16 for cheaper products."""

    matrix: Tensor
    energy: float  # ‖R‖², before any rounding
    probe: Tensor | None = None  # (in, k): its product is known already
    probed: Tensor | None = None  # (out, k)
    reread: Callable[[], "Residual"] | None = None  # gives the float32 one, if this is not

    @classmethod
    def of(cls, R: Tensor) -> "Residual":
        return cls(R, sum_of_squares(R))

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
    if X.is_cuda:
        # A chunk at a time would be waited for a chunk at a time.
        return float(torch.linalg.vector_norm(X, dtype=torch.float64).square())
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
