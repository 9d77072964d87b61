"""The step that every quantizer offers to the alternation: quantize what the low rank leaves."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from loftq_cli.core.blockwise import (
    BlockwiseFormat,
    QuantizedBlockwise,
    dequantize_blockwise,
    quantize_blockwise,
)
from loftq_cli.core.int8 import QuantizedInt8, dequantize_int8, quantize_int8
from loftq_cli.core.lowrank import LowRank

Quantized = QuantizedBlockwise | QuantizedInt8


class Quantizer(Protocol):
    """A way to store a weight in few bits."""

    def step(self, W: Tensor, low_rank: LowRank | None) -> tuple[Any, Tensor]:
        """(stored form of W − U·S·Vh, float32 residual W − Q), with Q as the runtime sees it."""

    def dequantize(self, quantized: Any) -> Tensor:
        """Q (out × in), in the dtype and to the bit that the runtime computes with."""


@dataclass(frozen=True)
class Blockwise:
    """4-bit blocks, dequantized by the runtime to ``dtype`` (the source's own unless given)."""

    format: BlockwiseFormat
    dtype: torch.dtype | None = None

    def step(self, W: Tensor, low_rank: LowRank | None) -> tuple[QuantizedBlockwise, Tensor]:
        target = _target(W, low_rank)
        quantized = quantize_blockwise(target, self.format, dtype=self.dtype or W.dtype)
        return quantized, W.float() - self.dequantize(quantized).float()

    def dequantize(self, quantized: QuantizedBlockwise) -> Tensor:
        return dequantize_blockwise(quantized)


@dataclass(frozen=True)
class Int8:
    """8-bit rows. The runtime dequantizes them to float32, whatever the source was."""

    def step(self, W: Tensor, low_rank: LowRank | None) -> tuple[QuantizedInt8, Tensor]:
        quantized = quantize_int8(_target(W, low_rank))
        return quantized, W.float() - self.dequantize(quantized)

    def dequantize(self, quantized: QuantizedInt8) -> Tensor:
        return dequantize_int8(quantized)


def _target(W: Tensor, low_rank: LowRank | None) -> Tensor:
    """What is to be quantized. Without a low rank yet, ``W`` itself, in its own dtype."""
    if low_rank is None:
        return W
    return torch.addmm(W.float(), low_rank.U * low_rank.S, low_rank.Vh, alpha=-1)
