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

from loftq_cli.errors import InvalidSetting, LoftqError

SVD_METHODS = ("exact", "randomized", "auto")


@dataclass(frozen=True)
class LowRank:
    """A truncated SVD, float32."""

    U: Tensor  # (out, r)
    S: Tensor  # (r,), descending
    Vh: Tensor  # (r, in)

    @property
    def energy(self) -> float:
        """‖U·S·Vh‖²: what it takes away from the square of the error."""
        return float(self.S.double().square().sum())

    def dense(self) -> Tensor:
        """U·S·Vh as a matrix (out × in)."""
        return (self.U * self.S) @ self.Vh


@torch.no_grad()
def truncated_svd(R: Tensor, rank: int, *, method: str = "auto") -> LowRank:
    """The ``rank`` largest singular values of the float32 matrix ``R`` with their vectors."""
    check_rank(rank, R.shape[0], R.shape[1])
    if method not in SVD_METHODS:
        raise InvalidSetting(f"SVD method {method!r} is not one of {', '.join(SVD_METHODS)}")
    U, S, Vh = _converged_svd(R)
    return LowRank(U[:, :rank].contiguous(), S[:rank].clone(), Vh[:rank].contiguous())


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


def lora_scaling(rank: int, alpha: float, use_rslora: bool = False) -> float:
    """The factor s that PEFT multiplies B·A with."""
    scaling = alpha / math.sqrt(rank) if use_rslora else alpha / rank
    if not (scaling > 0 and math.isfinite(scaling)):
        raise InvalidSetting(f"lora_alpha {alpha} gives a scaling of {scaling}: it must be above 0")
    return scaling


@torch.no_grad()
def split(low_rank: LowRank, scaling: float) -> tuple[Tensor, Tensor]:
    """The adapter (A, B) with scaling · B · A = U · S · Vh, both halves of equal size.

    The scaling is folded in here, as 1/√s on either side: PEFT multiplies with it in every
    forward pass, and a start that ignores it keeps only 2s − s² of what the SVD captured.
    """
    root = (low_rank.S / scaling).sqrt()
    return root[:, None] * low_rank.Vh, low_rank.U * root


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
