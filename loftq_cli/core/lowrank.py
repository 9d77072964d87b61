"""Truncated SVD, and how a low-rank correction is stored as a LoRA adapter.

    R ≈ U · diag(S) · Vh        U (out × r), S (r,) descending, Vh (r × in), orthonormal
    s · B · A = U · diag(S) · Vh        B = lora_B.weight (out × r), A = lora_A.weight (r × in)

No matrix of rank r is nearer to R in the Frobenius norm (Eckart and Young), and what it leaves is
known without forming it: ‖R − U·S·Vh‖² = ‖R‖² − Σσᵢ².
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.core.residual import Residual, rows_times
from loftq_cli.core.sketches import sketch_width, takes_exact
from loftq_cli.core.transfers import send
from loftq_cli.errors import InvalidSetting, LoftqError

_MOST_PASSES = 16
# Where the low rank holds so many times what it leaves, its rounding to bfloat16 would show.
_DOMINANT = 4.0
# What float32 products cannot tell apart.
_NOISE = 1e-7
# What a second pass gains of the first's gain, from a good start and from none: as was seen on
# the residuals of LoftQ.
_WARM_FALL, _COLD_FALL = 1 / 64, 1 / 4


@dataclass(frozen=True)
class LowRank:
    """A truncated SVD, float32. Where a singular value is zero, so may its vectors be."""

    U: Tensor  # (out, r)
    S: Tensor  # (r,), descending
    Vh: Tensor  # (r, in)
    subspace: Tensor | None = None  # (in, k ≥ r): where the SVD of a similar matrix may start
    known_energy: float | None = None  # where a GPU need not be asked for it

    @property
    def energy(self) -> float:
        """‖U·S·Vh‖²: what it takes away from the square of the error."""
        return _energy(self.S) if self.known_energy is None else self.known_energy

    def dense(self) -> Tensor:
        """U·S·Vh as a matrix (out × in)."""
        return (self.U * self.S) @ self.Vh


@torch.no_grad()
def truncated_svd(
    R: Residual,
    rank: int,
    *,
    method: str = "auto",
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    tolerance: float = 1e-3,
) -> LowRank:
    """The ``rank`` largest singular values of ``R`` with their vectors.

    ``exact`` is LAPACK's SVD of the whole matrix. ``randomized`` needs products with a few more
    vectors than ``rank``, begins with ``start`` if that is given (the ``subspace`` of a similar
    matrix's SVD) and ends when another pass would take off less than ``tolerance`` of the square of
    what remains. ``auto`` takes whichever is cheaper.
    """
    check_rank(rank, *R.shape)
    if takes_exact(R.shape, rank, method):
        U, S, Vh = _converged_svd(R.exact().matrix)
        return LowRank(U[:, :rank].contiguous(), S[:rank].clone(), Vh[:rank].contiguous())
    return _randomized_svd(R, rank, start, generator, tolerance)


def check_rank(rank: int, out_features: int, in_features: int) -> None:
    """Raise unless a weight of this shape has that many singular values."""
    largest = min(out_features, in_features)
    if rank > largest:
        raise InvalidSetting(
            f"rank {rank} is too large for a {out_features}×{in_features} weight: "
            f"at most {largest} is possible"
        )
    if rank < 1:
        raise InvalidSetting(f"rank {rank} is too small: at least 1 is needed")


@torch.no_grad()
def split(low_rank: LowRank, scaling: float) -> tuple[Tensor, Tensor]:
    """The adapter (A, B) with scaling · B · A = U · S · Vh, both halves of equal size.

    The scaling is folded in here, as 1/√s on either side: PEFT multiplies with it in every
    forward pass, and a start that ignores it keeps only 2s − s² of what the SVD captured.
    """
    root = (low_rank.S / scaling).sqrt()
    return root[:, None] * low_rank.Vh, low_rank.U * root


def rounded_to(dtype: torch.dtype, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """(A, B) as a file in this dtype holds them, in float32 again.

    Raises:
        InvalidSetting: a value is beyond its range.
    """
    if dtype == torch.float32:
        return A, B
    found = A.to(dtype).float(), B.to(dtype).float()
    if not all(bool(factor.isfinite().all()) for factor in found):
        largest = max(float(A.abs().max()), float(B.abs().max()))
        raise InvalidSetting(
            f"the adapter does not fit into {str(dtype).removeprefix('torch.')}",
            cause=f"it has values as large as {largest:.3g}",
            hint="--adapter-dtype bfloat16, or a larger --lora-alpha",
        )
    return found


def _converged_svd(R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD; if LAPACK's divide and conquer gives up, a slower way that does not."""
    attempts: list[tuple[torch.dtype, str | None]] = [(torch.float32, None), (torch.float64, None)]
    if R.is_cuda:
        attempts.insert(1, (torch.float32, "gesvd"))
    for dtype, driver in attempts:
        try:
            factors = torch.linalg.svd(R.to(dtype), full_matrices=False, driver=driver)
        except torch.linalg.LinAlgError:
            continue
        if all(factor.isfinite().all() for factor in factors):
            U, S, Vh = (factor.float() for factor in factors)
            return U, S, Vh
    raise LoftqError(
        f"the SVD of a {R.shape[0]}×{R.shape[1]} residual does not converge",
        cause="LAPACK gave up on it in float32 and in float64",
    )


def _randomized_svd(
    R: Residual,
    rank: int,
    start: Tensor | None,
    generator: torch.Generator | None,
    tolerance: float,
) -> LowRank:
    """Subspace iteration: R's range from its product with V, then V from the range's with R.

        Y = R·V                 U = Y·C orthonormal, C from the eigenvectors of YᵀY
        Z = Rᵀ·Y                (Rᵀ·U)ᵀ(Rᵀ·U) = Cᵀ·ZᵀZ·C = P·S²·Pᵀ
        U ← U·P                 V ← Rᵀ·U·P / S

    Only k × k matrices are decomposed, in float64. The eigenvalues of YᵀY are what V alone would
    have captured, so what a pass gained is known without a product more, and each gains less than
    the one before.

    They are decomposed on the CPU, also for a GPU. That is waited for once a pass: its own
    ``torch.linalg.eigh`` would wait in each of the two, to see whether they have converged.
    """
    if R.energy == 0:
        U, V = (torch.zeros(n, 0, device=R.device) for n in R.shape)
        return _low_rank(U, torch.zeros(0), V, rank)
    width = sketch_width(rank)
    V, orthonormal = _first_subspace(R, width, start, generator)
    gain, first_fall = math.inf, _WARM_FALL if orthonormal else _COLD_FALL
    for _ in range(_MOST_PASSES):
        sketch = R.sketch(V)
        seen, C = _eigh(sketch.gram_Y, R)
        before = float(seen[:rank].sum()) if orthonormal else -math.inf
        C = C / seen.sqrt()
        squares, P = _eigh(C.t() @ sketch.gram_Z @ C, R)
        after = float(squares[:rank].sum())
        S, C = squares.sqrt(), C @ P
        V, orthonormal = rows_times(sketch.Z.float(), send(C / S, R.device)), True
        remaining = R.energy * sketch.unit**2 - after
        gain, last_gain = after - before, gain
        falls = gain / last_gain if math.isfinite(last_gain) else first_fall
        if not R.is_exact and after > _DOMINANT * remaining:
            R = R.exact()  # rounded products would be felt
            V, orthonormal = _first_subspace(R, width, V, generator)
        elif falls * gain <= max(tolerance * remaining, _NOISE * after):
            break
    U = rows_times(sketch.Y.float(), send(C[:, :rank], R.device))
    return _low_rank(U, S[:rank] / sketch.unit, V, rank)


def _first_subspace(
    R: Residual, width: int, start: Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor, bool]:
    """The vectors to begin with, filled up at random, and whether its columns are orthonormal."""
    missing = width if start is None else width - start.shape[1]
    if start is not None and missing <= 0:
        return start, True
    n = R.shape[1]
    fresh = send(torch.randn(n, missing, generator=generator).div_(math.sqrt(n)), R.device)
    return fresh if start is None else torch.cat((start, fresh), dim=1), False


def _eigh(G: Tensor, R: Residual) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and eigenvectors; without those that are only rounding."""
    values, vectors = torch.linalg.eigh(G)
    values, vectors = values.flip(0), vectors.flip(1)
    kept = int((values > (1e-12 if R.is_exact else 1e-6) * values[:1]).sum())
    return values[:kept], vectors[:, :kept]


def _energy(S: Tensor) -> float:
    return float(S.double().square().sum())


def _low_rank(U: Tensor, S: Tensor, V: Tensor, rank: int) -> LowRank:
    """Of exactly that rank, filled up with zeros where the matrix has less. S is on the CPU."""
    Vh = V[:, : S.numel()].t()
    missing = rank - S.numel()
    if missing:
        U = torch.nn.functional.pad(U, (0, missing))
        S = torch.nn.functional.pad(S, (0, missing))
        Vh = torch.nn.functional.pad(Vh, (0, 0, 0, missing))
    S = S.float()
    subspace = V if V.shape[1] else None
    return LowRank(U, send(S, U.device), Vh.contiguous(), subspace, _energy(S))
