"""The second moments of a layer's inputs as a measure of errors, and the best low rank in it.

What an error R (out × in) of a weight does to the outputs is, for inputs with G = E[x·xᵀ],

    E‖R·x‖² = tr(R·G·Rᵀ) = ‖R·S‖²        for any S with S·Sᵀ = G

The matrix of rank r that is nearest to R in this norm is U·Uᵀ·R, with U the r first left singular
vectors of R·S: that is SVD_r(R·S)·S⁻¹ without the inverse, which need not exist. With G = PΛPᵀ and
S = PΛ^½ it is what QERA (arXiv 2410.06040), CALDERA and EoRA give; here S comes from Cholesky's
decomposition, for a thirtieth of the work.

Where layers before it are quantized already, a layer is given x̃ where it used to be given x. What
it puts out instead, Ŵ·x̃ with R = W − Ŵ, is then off by

    W·x − Ŵ·x̃ = W·(x − x̃) + R·x̃
    E‖W·x − Ŵ·x̃‖² = E‖W·(x − x̃)‖² + 2·tr(W·D·Rᵀ) + tr(R·H·Rᵀ)

with H = E[x̃·x̃ᵀ] in the place of G, and the drift D = E[(x − x̃)·x̃ᵀ].
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.core.lowrank import LowRank, truncated_svd
from loftq_cli.core.parallel import all_threads, each
from loftq_cli.core.residual import Residual, rows_a_piece, transposed_times
from loftq_cli.errors import InvalidSetting, LoftqError

# What is added to the diagonal, as a share of its mean. Few samples say little of directions that
# they hardly reach, and codes must not rely on such.
DAMPING = 0.01
_MOST_DAMPING = 1.0
# Columns of a product with half a matrix, of which the other half is zero or the same.
_WIDE = 512
# A mean square below this counts as none: its reciprocal would overflow.
_NOTHING = 1e-36


@dataclass(frozen=True)
class Drift:
    """How far from the original's inputs x those are that a quantized model gives, x̃."""

    cross: Tensor  # E[(x − x̃)·x̃ᵀ] (in × in)
    output_energy: float  # E‖W·(x − x̃)‖²
    # Of a layer that writes to the residual stream, which is h before it: in units of its output.
    stream: Tensor | None = None  # S = E[(h − h̃)·x̃ᵀ] (out × in)

    def to(self, device: torch.device) -> "Drift":
        """In float32 on this device."""
        stream = None if self.stream is None else self.stream.to(device, torch.float32)
        return Drift(self.cross.to(device, torch.float32), self.output_energy, stream)


def check_moments(moments: Tensor, weight: tuple[int, ...], drift: Drift | None = None) -> None:
    """Raise unless these can be the second moments, and the drift, for a weight of this shape."""
    out_features, in_features = weight
    square = (in_features, in_features)
    matrices = [(moments, square)]
    if drift is not None:
        matrices.append((drift.cross, square))
        if drift.stream is not None:
            matrices.append((drift.stream, (out_features, in_features)))
    for matrix, shape in matrices:
        if matrix.shape != shape:
            raise InvalidSetting(
                f"calibration moments of shape {tuple(matrix.shape)} do not belong to a weight "
                f"with {out_features} outputs and {in_features} inputs"
            )
        if not all(bound.isfinite() for bound in matrix.aminmax()):
            raise LoftqError(
                "the calibration moments hold NaN or infinite values",
                cause="the model's activations overflowed on the calibration text",
                hint="collect them in float32 or bfloat16",
            )
    if moments.diagonal().min() < 0:
        raise InvalidSetting("the calibration moments are negative: those of no inputs are")


@dataclass(frozen=True)
class DampedMoments:
    """Damped moments in units of their mean diagonal, and their triangular root."""

    moments: Tensor  # float32 (in, in), positive definite
    root: Tensor  # float32 (in, in), upper triangular: root·rootᵀ = moments
    unit: float = 0.0  # what the moments were multiplied with before; 0 where there were none

    @classmethod
    def of(cls, moments: Tensor, damping: float = DAMPING) -> "DampedMoments":
        """Inputs that were never seen count as independent, and all alike."""
        n = moments.shape[0]
        mean = float(moments.diagonal().double().mean())
        if mean < _NOTHING:
            identity = torch.eye(n, device=moments.device)
            return cls(identity, identity)
        G = moments.float() * (1 / mean)
        with all_threads():
            while damping <= _MOST_DAMPING:
                damped = G.clone()
                damped.diagonal().add_(damping)
                lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
                if not failed:
                    return cls(damped, lower.flip(0, 1), 1 / mean)
                damping *= 10
        raise LoftqError(
            "the calibration moments are not positive semidefinite",
            cause="Cholesky's decomposition failed however much was added to their diagonal",
        )

    def times_inverse(self, M: Tensor) -> Tensor:
        """M·moments⁻¹ (out × in) for an M as large."""
        with all_threads():
            half = torch.linalg.solve_triangular(self.root.t(), M, upper=False, left=False)
            return torch.linalg.solve_triangular(self.root, half, upper=True, left=False)


def principal_root(moments: Tensor) -> Tensor:
    """PΛ^½ (in × k), for QERA, of those eigenvalues that are more than float32's rounding."""
    with all_threads():
        values, vectors = torch.linalg.eigh(moments.double())
    n = values.numel()
    kept = values > values[-1] * n * torch.finfo(torch.float32).eps
    return (vectors[:, kept] * values[kept].sqrt()).float()


def weighted_low_rank(
    R: Tensor,
    root: Tensor,
    rank: int,
    generator: torch.Generator,
    *,
    start: Tensor | None = None,
    tolerance: float = 1e-3,
) -> LowRank:
    """The matrix of this rank nearest to ``R`` in the norm ‖(R − L)·root‖, as its own SVD.

    ``root`` is S (in × k), or the diagonal of one (in,). The ``subspace`` is that of R·S.
    """
    if rank == 0:
        return LowRank(R.new_zeros(R.shape[0], 0), R.new_zeros(0), R.new_zeros(0, R.shape[1]))
    weighted = R * root if root.ndim == 1 else _times_root(R, root)
    svd = truncated_svd(
        Residual.of(weighted), rank, start=start, generator=generator, tolerance=tolerance
    )
    right = transposed_times(svd.U, R).to(R)
    own = truncated_svd(Residual.of(right), rank, method="exact")
    return LowRank(svd.U @ own.U, own.S, own.Vh, svd.subspace)


def output_energy(
    R: Tensor, moments: Tensor, linear: Tensor | None = None, constant: float = 0.0
) -> float:
    """tr(R·G·Rᵀ) + 2·tr(M·Rᵀ) + ``constant`` with M = ``linear`` (out × in), never below zero.

    Products are in float32, their sum in float64. Of the ``moments``, which are symmetric, only the
    upper half is looked at.
    """
    rows = _rows(R)
    sums = [0.0] * -(-R.shape[0] // rows)

    def work(piece: int) -> None:
        those = slice(piece * rows, (piece + 1) * rows)
        part = R[those]
        total = torch.zeros((), dtype=torch.float64, device=R.device)
        for columns in _wide(R.shape[1]):
            before = slice(columns.start)
            own = part[:, columns] @ moments[columns, columns]
            product = own.addmm_(part[:, before], moments[before, columns], alpha=2)
            if linear is not None:
                product.add_(linear[those, columns], alpha=2)
            total += product.mul_(part[:, columns]).sum(dtype=torch.float64)
        sums[piece] = float(total)

    each(work, len(sums))
    return max(math.fsum([*sums, constant]), 0.0)


def _times_root(R: Tensor, root: Tensor) -> Tensor:
    """R·S (out × k); where S is triangular without its zeros."""
    out = R.new_empty(R.shape[0], root.shape[1])
    rows = _rows(R)
    parts = [
        (columns, slice(columns.stop if not root[columns.stop :, columns].any() else None))
        for columns in _wide(root.shape[1])
    ]

    def work(piece: int) -> None:
        part = slice(piece * rows, (piece + 1) * rows)
        for columns, there in parts:
            out[part, columns] = R[part, there] @ root[there, columns]

    each(work, -(-R.shape[0] // rows))
    return out


def _rows(R: Tensor) -> int:
    """Rows that are worked on at a time."""
    return rows_a_piece(R.shape[0], R.shape[1]) if R.device.type == "cpu" else R.shape[0]


def _wide(columns: int) -> Iterator[slice]:
    """Columns that are worth a product together."""
    return (slice(first, min(first + _WIDE, columns)) for first in range(0, columns, _WIDE))
