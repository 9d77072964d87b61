"""The quantizers: blocks of bitsandbytes' few bits or of integers, and its rows of eight bits."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loftq_cli.core.blockwise import (
    BlockwiseFormat,
    QuantizedBlockwise,
    dequantize_blockwise,
    double_quantize,
    pack,
    quantize_blockwise,
    restore_absmax,
)
from loftq_cli.core.codebooks import Levels, codebook
from loftq_cli.core.extrapolation import Extrapolation
from loftq_cli.core.int8 import QuantizedInt8, dequantize_int8, quantize_int8
from loftq_cli.core.integers import (
    IntegerFormat,
    QuantizedIntegers,
    dequantize_integers,
    quantize_integers,
)
from loftq_cli.core.parallel import each
from loftq_cli.core.residual import Residual, rows_a_piece, worth_compiling
from loftq_cli.core.steps import Factors, Quantizer, ReferenceSteps, Steps, aimed


@dataclass(frozen=True)
class BlocksQuantizer(Quantizer):
    """Codes for levels, in blocks that share a scale; dequantized to ``dtype`` by the runtime.

    ``dtype`` is the source's own unless given. Every block's scale (absmax) is searched for, or
    what the format's own library would take without ``search``. Compiled kernels do the work on
    CPUs and on CUDA; ``readable`` keeps to the reference.
    """

    format: Any
    dtype: torch.dtype | None = None
    readable: bool = False
    search: bool = True

    @property
    def searches(self) -> bool:
        return self.search

    def plain(self) -> "BlocksQuantizer":
        return replace(self, search=False)

    @property
    @abstractmethod
    def levels(self) -> Levels:
        """What codes may stand for."""

    @abstractmethod
    def block_size(self, in_features: int) -> int:
        """Values in a block, of a weight with rows of so many."""

    @abstractmethod
    def largest(self, dtype: torch.dtype) -> float:
        """What no scale may exceed in a weight that is dequantized to ``dtype``."""

    @property
    @abstractmethod
    def rounds_together(self) -> bool:
        """Whether a scale's rounding is known only when all scales are."""

    @abstractmethod
    def stored(self, indices: Tensor, scales: Tensor, dtype: torch.dtype) -> Any:
        """The stored form of ``indices`` (out, in) into the ascending levels and ``scales``.

        The scales are (blocks,), and ``dtype`` is what the runtime dequantizes to.
        """

    def steps(self, W: Tensor, *, rounded: bool = False) -> Steps:
        if W.is_cuda and not self.readable:
            from loftq_cli.core import cuda_step

            if cuda_step.takes(W, self.block_size(W.shape[1])):
                return cuda_step.TritonSteps(
                    W, self.format, self.dtype or W.dtype, search=self.search
                )
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
class Blockwise(BlocksQuantizer):
    """bitsandbytes' 4-bit blocks."""

    format: BlockwiseFormat

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

    @property
    def levels(self) -> Levels:
        return codebook(self.format.quant_type, self.format.bits)

    def block_size(self, in_features: int) -> int:
        return self.format.block_size

    def largest(self, dtype: torch.dtype) -> float:
        return torch.finfo(dtype).max

    @property
    def rounds_together(self) -> bool:
        return self.format.double_quant

    def stored(self, indices: Tensor, scales: Tensor, dtype: torch.dtype) -> QuantizedBlockwise:
        shape = (indices.shape[0], indices.shape[1])
        absmax = double_quantize(scales, self.format)
        return QuantizedBlockwise(self._packed(indices), *absmax, shape, self.format, dtype)

    def recoded(self, stored: QuantizedBlockwise, indices: Tensor) -> QuantizedBlockwise:
        """The same absmax with other codes."""
        return replace(stored, packed=self._packed(indices))

    def _packed(self, indices: Tensor) -> Tensor:
        order = codebook(self.format.quant_type, self.format.bits).order_tensor(indices.device)
        return pack(order[indices.view(-1).int()]).view(-1, 1)


@dataclass(frozen=True)
class Integers(BlocksQuantizer):
    """Symmetric integers with 16-bit scales."""

    format: IntegerFormat

    def quantize(
        self, target: Tensor, dtype: torch.dtype, like: QuantizedIntegers | None = None
    ) -> QuantizedIntegers:
        return quantize_integers(
            target,
            self.format,
            dtype=self.dtype or dtype,
            search=self.search,
            previous=like.scales if self.search and like is not None else None,
        )

    def dequantize(self, quantized: QuantizedIntegers) -> Tensor:
        return dequantize_integers(quantized)

    @property
    def levels(self) -> Levels:
        return self.format.grid

    def block_size(self, in_features: int) -> int:
        return self.format.size(in_features)

    def largest(self, dtype: torch.dtype) -> float:
        return self.format.largest_scale

    @property
    def rounds_together(self) -> bool:
        return False

    def stored(self, indices: Tensor, scales: Tensor, dtype: torch.dtype) -> QuantizedIntegers:
        grid = self.format.grid
        scales = grid.possible(scales, self.largest(dtype)).view(indices.shape[0], -1)
        codes = (indices.to(torch.int16) + grid.lowest).to(torch.int8)
        # A block whose scale is 0 may have been given any codes.
        by_block = codes.view(*scales.shape, -1) * (scales != 0)[:, :, None]
        return QuantizedIntegers(by_block.view(indices.shape), scales, self.format, dtype)


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
        self,
        carried: Factors | None = None,
        like: QuantizedInt8 | None = None,
        extrapolation: Extrapolation | None = None,
    ) -> tuple[QuantizedInt8, Residual]:
        W = self.W
        rows = rows_a_piece(*W.shape) if W.device.type == "cpu" else W.shape[0]
        matrix = torch.empty(W.shape, device=W.device)
        parts: dict[int, QuantizedInt8] = {}

        def work(piece: int) -> None:
            part = slice(piece * rows, (piece + 1) * rows)
            parts[piece] = quantize_int8(aimed(W, carried, extrapolation, part))
            torch.sub(W[part].float(), dequantize_int8(parts[piece]), out=matrix[part])

        each(work, -(-W.shape[0] // rows))
        codes, scb = zip(*((parts[i].codes, parts[i].scb) for i in sorted(parts)), strict=True)
        residual = Residual.of(matrix, carried and carried.subspace)
        return QuantizedInt8(torch.cat(codes), torch.cat(scb)), residual
