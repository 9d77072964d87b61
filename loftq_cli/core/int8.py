"""bitsandbytes' vectorwise int8: one absmax for each row, stored as ``SCB``.

    SCB[i]  = max_j |W[i, j]|                   code[i, j] = round(W[i, j] · (127 / SCB[i]))
    Q[i, j] = code[i, j] · SCB[i] · (1/127)     float32, whatever the source was

Rounding is half to even, all arithmetic float32. ``Int8Params`` squeezes a weight through float16
before it does the same; from float32 and bfloat16 sources that only loses, so it is left out here:
what is loaded is codes and SCB, and those are read as they are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from loftq_cli.core.blockwise import check_weight
from loftq_cli.core.codebooks import INT8_LARGEST, INT8_RECIPROCAL


@dataclass(frozen=True)
class QuantizedInt8:
    """What bitsandbytes stores for an 8-bit linear layer."""

    codes: Tensor  # int8 (out, in)
    scb: Tensor  # float32 (out,)


@torch.no_grad()
def quantize_int8(W: Tensor) -> QuantizedInt8:
    """The codes and row absmax that ``int8_vectorwise_quant`` gives on the CPU, bit for bit.

    Where bitsandbytes divides by zero (a row of zeros) or overflows (a row whose largest value is
    below 4e-37) and casts what is not finite to int8, which C++ leaves undefined, the plain
    definition holds: zeros are stored as code 0 under SCB 0, and tiny rows as all others.
    """
    check_weight(W)
    peak = W.abs().amax(dim=1, keepdim=True).float()
    scale = INT8_LARGEST / peak
    codes = (W * scale).round_()
    undefined = scale.isinf().squeeze(1)
    if undefined.any():
        tiny = peak[undefined]
        rows = W[undefined].float() / torch.where(tiny > 0, tiny, 1.0)
        codes[undefined] = (rows * INT8_LARGEST).round_()
    return QuantizedInt8(codes.to(torch.int8), peak.squeeze(1))


@torch.no_grad()
def dequantize_int8(q: QuantizedInt8) -> Tensor:
    """What ``int8_vectorwise_dequant`` gives, bit for bit: float32 (out, in)."""
    return q.codes * q.scb.view(-1, 1) * INT8_RECIPROCAL
