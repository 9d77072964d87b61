"""The two quantizers: blocks of a few bits, and rows of eight."""

from dataclasses import dataclass, replace

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
from loftq_cli.core.residual import Residual, rows_a_piece, worth_compiling
from loftq_cli.core.steps import Factors, Quantizer, ReferenceSteps, Steps, without


@dataclass(frozen=True)
class Blockwise(Quantizer):
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

    def quantize(
        self, target: Tensor, dtype: torch.dtype, like: QuantizedBlockwise | None = None
    ) -> QuantizedBlockwise:
        return quantize_blockwise(
            target,
            self.format,
            dtype=self.dtype or dtype,
            search=self.search,
            previous=restore_absmax(like) if self.search and like is not None else None,
        )

    def dequantize(self, quantized: QuantizedBlockwise) -> Tensor:
        return dequantize_blockwise(quantized)

    def steps(self, W: Tensor, *, rounded: bool = False) -> Steps:
        if self.readable or not worth_compiling(W):
            return ReferenceSteps(W, self)
        from loftq_cli.core import compiled_step

        return compiled_step.CompiledSteps(
            W,
            self.format,
            self.dtype or W.dtype,
            search=self.search,
            products=compiled_step.product_dtype() if rounded else torch.float32,
        )


@dataclass(frozen=True)
class Int8(Quantizer):
    """8-bit rows. The runtime dequantizes them to float32, whatever the source was."""

    def quantize(
        self, target: Tensor, dtype: torch.dtype, like: QuantizedInt8 | None = None
    ) -> QuantizedInt8:
        return quantize_int8(target)

    def dequantize(self, quantized: QuantizedInt8) -> Tensor:
        return dequantize_int8(quantized)

    def steps(self, W: Tensor, *, rounded: bool = False) -> Steps:
        return _Int8Steps(W, self)


class _Int8Steps(ReferenceSteps):
    """Some rows at a time, on all threads: every row is quantized by itself."""

    def quantize(
        self, carried: Factors | None = None, like: QuantizedInt8 | None = None
    ) -> tuple[QuantizedInt8, Residual]:
        W = self.W
        rows = rows_a_piece(*W.shape) if W.device.type == "cpu" else W.shape[0]
        matrix = torch.empty(W.shape, device=W.device)
        parts: dict[int, QuantizedInt8] = {}

        def work(piece: int) -> None:
            part = slice(piece * rows, (piece + 1) * rows)
            here = carried and Factors(carried.left[part], carried.right)
            parts[piece] = quantize_int8(without(W[part], here))
            torch.sub(W[part].float(), dequantize_int8(parts[piece]), out=matrix[part])

        each(work, -(-W.shape[0] // rows))
        codes, scb = zip(*((parts[i].codes, parts[i].scb) for i in sorted(parts)), strict=True)
        return QuantizedInt8(torch.cat(codes), torch.cat(scb)), Residual.of(matrix)
