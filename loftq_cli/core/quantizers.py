"""The step that every quantizer offers to the alternation: quantize what the low rank leaves."""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from loftq_cli.core.blockwise import (
    BlockwiseFormat,
    QuantizedBlockwise,
    dequantize_blockwise,
    quantize_blockwise,
    restore_absmax,
)
from loftq_cli.core.int8 import QuantizedInt8, dequantize_int8, quantize_int8
from loftq_cli.core.parallel import each
from loftq_cli.core.residual import Residual, rows_a_piece, sum_of_squares, worth_compiling

Quantized = QuantizedBlockwise | QuantizedInt8
# A matrix of low rank as two factors, left (out × r) and right (r × in), both float32.
Product = tuple[Tensor, Tensor]


class Quantizer(Protocol):
    """A way to store a weight in few bits."""

    def step(
        self,
        W: Tensor,
        carried: Product | None,
        *,
        previous: Any = None,
        probe: Tensor | None = None,
        fast: bool = False,
        spare: Residual | None = None,
    ) -> tuple[Any, Residual]:
        """(the stored form of W − left·right, the residual W − Q with Q as the runtime sees it).

        ``previous`` is the stored form of a similar matrix, where a search for a better one begins.
        ``probe`` says which product with the residual is wanted first. ``fast`` allows products
        with the residual, and the product that is carried, to be rounded to bfloat16; the stored
        form and what it leaves are exact all the same. ``spare`` is a residual that nobody needs
        any more: its memory may be taken.
        """

    @property
    def searches(self) -> bool:
        """Whether a step from the ``previous`` form leaves no more of its target than that did."""

    def plain(self) -> "Quantizer":
        """The same way of storing, filled as its runtime's own library would, without a search."""

    def dequantize(self, quantized: Any) -> Tensor:
        """Q (out × in), in the dtype and to the bit that the runtime computes with."""

    def remainder(self, W: Tensor, quantized: Any, carried: Product) -> float:
        """‖W − Q − left·right‖², the product in float32 and the sum in float64."""


@dataclass(frozen=True)
class Blockwise:
    """4-bit blocks, dequantized by the runtime to ``dtype`` (the source's own unless given).

    Every block's absmax is searched for, or bitsandbytes' own without ``search``. On the CPU
    compiled kernels do the work; ``readable`` keeps to the reference.
    """

    format: BlockwiseFormat
    dtype: torch.dtype | None = None
    readable: bool = False
    search: bool = True

    @property
    def searches(self) -> bool:
        return self.search

    def plain(self) -> "Blockwise":
        return replace(self, search=False)

    def step(
        self,
        W: Tensor,
        carried: Product | None,
        *,
        previous: QuantizedBlockwise | None = None,
        probe: Tensor | None = None,
        fast: bool = False,
        spare: Residual | None = None,
    ) -> tuple[QuantizedBlockwise, Residual]:
        dtype = self.dtype or W.dtype
        around = restore_absmax(previous) if self.search and previous is not None else None
        if self._compiled(W):
            from loftq_cli.core import compiled_step

            return compiled_step.step(
                W,
                carried,
                self.format,
                dtype,
                search=self.search,
                previous=around,
                products=compiled_step.product_dtype() if fast else torch.float32,
                probe=probe,
                spare=spare,
            )
        quantized = quantize_blockwise(
            _target(W, carried), self.format, dtype=dtype, search=self.search, previous=around
        )
        return quantized, Residual.of(W.float() - self.dequantize(quantized).float())

    def dequantize(self, quantized: QuantizedBlockwise) -> Tensor:
        return dequantize_blockwise(quantized)

    def remainder(self, W: Tensor, quantized: QuantizedBlockwise, carried: Product) -> float:
        if self._compiled(W):
            from loftq_cli.core import compiled_step

            return compiled_step.remainder(W, quantized, *carried)
        return _remainder(W, self.dequantize(quantized), carried)

    def _compiled(self, W: Tensor) -> bool:
        return not self.readable and worth_compiling(W)


@dataclass(frozen=True)
class Int8:
    """8-bit rows. The runtime dequantizes them to float32, whatever the source was."""

    @property
    def searches(self) -> bool:
        return False

    def plain(self) -> "Int8":
        return self

    def step(
        self,
        W: Tensor,
        carried: Product | None,
        *,
        previous: QuantizedInt8 | None = None,
        probe: Tensor | None = None,
        fast: bool = False,
        spare: Residual | None = None,
    ) -> tuple[QuantizedInt8, Residual]:
        rows = rows_a_piece(*W.shape) if W.device.type == "cpu" else W.shape[0]
        matrix = torch.empty(W.shape, device=W.device)
        parts: dict[int, QuantizedInt8] = {}

        def work(piece: int) -> None:
            part = slice(piece * rows, (piece + 1) * rows)
            w = W[part]
            parts[piece] = quantize_int8(_target(w, carried and (carried[0][part], carried[1])))
            torch.sub(w.float(), self.dequantize(parts[piece]), out=matrix[part])

        each(work, -(-W.shape[0] // rows))
        codes, scb = zip(*((parts[i].codes, parts[i].scb) for i in sorted(parts)), strict=True)
        return QuantizedInt8(torch.cat(codes), torch.cat(scb)), Residual.of(matrix)

    def dequantize(self, quantized: QuantizedInt8) -> Tensor:
        return dequantize_int8(quantized)

    def remainder(self, W: Tensor, quantized: QuantizedInt8, carried: Product) -> float:
        return _remainder(W, self.dequantize(quantized), carried)


def _target(W: Tensor, carried: Product | None) -> Tensor:
    """What is to be quantized. Without a low rank yet, ``W`` itself, in its own dtype."""
    if carried is None:
        return W
    return torch.addmm(W.float(), *carried, alpha=-1)


def _remainder(W: Tensor, Q: Tensor, carried: Product) -> float:
    return sum_of_squares(torch.addmm(W.float() - Q.float(), *carried, alpha=-1))
