"""What a way of storing weights must offer, and the step that the alternation makes of it.

A container that needs numerics of its own writes a :class:`Quantizer`: how a matrix is stored, and
what the runtime makes of that. All else follows from these two in plain torch; a quantizer with
faster loops returns :class:`Steps` of its own.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from loftq_cli.core.extrapolation import Extrapolation
from loftq_cli.core.residual import Residual, sum_of_squares


class Factors(NamedTuple):
    """A matrix of low rank, left · right, both float32."""

    left: Tensor  # (out, r)
    right: Tensor  # (r, in)
    # (in, k): what the next residual will be multiplied with first, where that is known
    subspace: Tensor | None = None


class Quantizer(ABC):
    """A way to store a weight in few bits."""

    @abstractmethod
    def quantize(self, target: Tensor, dtype: torch.dtype, like: Any = None) -> Any:
        """The stored form of ``target`` (out × in), which comes from a source of this ``dtype``.

        ``like`` is the stored form of a similar matrix: a search begins there.
        """

    @abstractmethod
    def dequantize(self, quantized: Any) -> Tensor:
        """Q (out × in), in the dtype and to the bit that the runtime computes with."""

    @property
    def searches(self) -> bool:
        """Whether what is quantized ``like`` another form leaves no more of it than that did."""
        return False

    def plain(self) -> "Quantizer":
        """The same way of storing, filled as its runtime's own library would, without a search."""
        return self

    def steps(self, W: Tensor, *, rounded: bool = False) -> "Steps":
        """The steps for the weight ``W`` (out × in).

        ``rounded`` allows products, those with the residual and the one that is subtracted, in
        bfloat16; the stored form and what it leaves are exact all the same.
        """
        return ReferenceSteps(W, self)


class Steps(Protocol):
    """One weight W, quantized again and again while the low rank beside it changes."""

    def quantize(
        self,
        carried: Factors | None = None,
        like: Any = None,
        extrapolation: Extrapolation | None = None,
    ) -> tuple[Any, Residual]:
        """(the stored form of W − carried, the residual W − Q with Q as the runtime sees it).

        An ``extrapolation`` says what is carried instead, from what is given. The residual is good
        until the next call, which may take its memory.
        """

    def remainder(self, quantized: Any, carried: Factors) -> float:
        """‖W − Q − carried‖², the product in float32 and the sum in float64."""


class ReferenceSteps:
    """The steps of any quantizer, in plain torch and on any device."""

    def __init__(self, W: Tensor, quantizer: Quantizer) -> None:
        self.W = W
        self.quantizer = quantizer

    def quantize(
        self,
        carried: Factors | None = None,
        like: Any = None,
        extrapolation: Extrapolation | None = None,
    ) -> tuple[Any, Residual]:
        target = aimed(self.W, carried, extrapolation, slice(None))
        quantized = self.quantizer.quantize(target, self.W.dtype, like)
        Q = self.quantizer.dequantize(quantized)
        return quantized, Residual.of(self.W.float() - Q.float(), carried and carried.subspace)

    def remainder(self, quantized: Any, carried: Factors) -> float:
        rest = self.W.float() - self.quantizer.dequantize(quantized).float()
        return sum_of_squares(without(rest, carried))


def aimed(
    W: Tensor, carried: Factors | None, extrapolation: Extrapolation | None, rows: slice
) -> Tensor:
    """These rows of what a step quantizes."""
    if carried is None or extrapolation is None:
        here = carried and Factors(carried.left[rows], carried.right)
        return without(W[rows], here)
    return W[rows].float() - extrapolation.aim(rows, carried.left[rows] @ carried.right)


def without(W: Tensor, carried: Factors | None) -> Tensor:
    """W − left · right. Without a low rank yet, ``W`` itself, in its own dtype."""
    if carried is None:
        return W
    return torch.addmm(W.float(), carried.left, carried.right, alpha=-1)
