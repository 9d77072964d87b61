"""What a weight loses in so many bits, and how much of that an adapter of any rank brings back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.core.blockwise import check_finite, check_weight
from loftq_cli.core.input_moments import Inputs
from loftq_cli.core.lowrank import truncated_svd
from loftq_cli.core.quantizers import Quantizer
from loftq_cli.core.residual import Residual, rows_times, sum_of_squares


@dataclass(frozen=True)
class Loss:
    """Shares of the energy of what the layer puts out."""

    whole: float  # what quantizing takes away
    captured: tuple[float, ...]  # what each direction of an adapter brings back, descending

    def times(self, count: int) -> "Loss":
        """The same of a layer that counts so many times."""
        return Loss(count * self.whole, tuple(count * each for each in self.captured))


@torch.no_grad()
def losses(
    W: Tensor,
    quantizers: list[Quantizer],
    rank: int,
    *,
    inputs: Inputs | None = None,
    seed: int = 0,
) -> list[Loss]:
    """The loss of the weight ``W`` (out × in) with each quantizer, before and at every rank.

        whole = ‖R·S‖² / ‖W·S‖²        captured[i] = σᵢ(R·S)² / ‖W·S‖²        R = W − Q, i ≤ rank

    S is the root of the ``inputs``' moments; without them inputs count as independent and all
    alike, S = 1. No rank, no decomposition.
    """
    check_weight(W)
    check_finite(W)
    norm = sum_of_squares(W) if inputs is None else sum_of_squares(_seen(W.float(), inputs))
    found = []
    for quantizer in quantizers:
        _, residual = quantizer.step(W, None)
        if inputs is not None:
            residual = Residual.of(_seen(residual.matrix, inputs))
        captured: tuple[float, ...] = ()
        if rank:
            generator = torch.Generator().manual_seed(seed)
            svd = truncated_svd(residual, min(rank, *W.shape), generator=generator)
            captured = tuple((svd.S.double().square() / (norm or 1.0)).tolist())
        found.append(Loss(residual.energy / (norm or 1.0), captured))
    return found


def _seen(R: Tensor, inputs: Inputs) -> Tensor:
    """R·S: what ``R`` makes of the inputs, as if those were independent."""
    return rows_times(R, inputs.root)
