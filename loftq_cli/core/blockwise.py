"""Blockwise 4-bit quantization, the readable reference: what bitsandbytes stores, bit for bit.

    the weight, row by row, is cut into blocks of ``block_size`` values; the last may be shorter
    absmax[b] = max |w| over block b
    code[i]   = the level nearest to w[i] / absmax[b], a tie going to the lower level
    Q[i]      = level[code[i]] · absmax[b], in float32, then rounded to the dtype of the source

Double quantization stores the absmax themselves in eight bits: their mean is taken off and the
rest quantized blockwise to the dynamic map, 256 at a time. The codes do not see it: they were
chosen for the exact absmax.

With a search the absmax are those of ``absmax.py``, which leave less and may be negative, and the
codes are the nearest for the absmax that will be read back. All else is the same.

Held to bitsandbytes 0.50.2 on the CPU. Its dequantization agrees with the line above in every bit
with three exceptions, and in all of them this module keeps to the line above:

- with AVX512-BF16, results below 2^-126 become zero on their way to bfloat16;
- without AVX512, and for rows of other than a multiple of 16 values, FP4's second zero is -0;
- with AVX512, a kernel numbers the blocks from each row's start and so reads the wrong absmax when
  a block reaches over the end of a row of a multiple of 16 values and is shorter than 2048. Other
  machines are right.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from loftq_cli.core.absmax import SMALLEST, search_absmax
from loftq_cli.core.codebooks import Codebook, codebook, dynamic_map
from loftq_cli.errors import InvalidSetting, NonFiniteWeight
from loftq_cli.formats import BLOCK_SIZES, NESTED_BLOCK_SIZE, QuantType

SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Work goes by this many values, so that no temporary grows with the weight: 4 MiB of float32.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class BlockwiseFormat:
    """How a weight is stored in four bits."""

    quant_type: QuantType = "nf4"
    block_size: int = 64
    double_quant: bool = False
    bits: int = 4  # 2 and 3 make do with some of the levels, stored as the same four bits

    def __post_init__(self) -> None:
        codebook(self.quant_type, self.bits)
        if self.block_size not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise InvalidSetting(f"block size {self.block_size} is not one of {sizes}")


@dataclass(frozen=True)
class QuantizedBlockwise:
    """The tensors that bitsandbytes stores for a 4-bit linear layer, and how to read them."""

    packed: Tensor  # uint8 (ceil(n / 2), 1): two codes a byte, the first in the high nibble
    absmax: Tensor  # float32 (blocks,); uint8 codes of it when double-quantized
    nested_absmax: Tensor | None  # float32 (ceil(blocks / 256),) when double-quantized
    # The mean absmax, a float32 value, when double-quantized. On a GPU nobody waits for it before
    # it is stored.
    nested_offset: float | Tensor | None
    shape: tuple[int, int]
    format: BlockwiseFormat
    dtype: torch.dtype  # what the runtime dequantizes to


@torch.no_grad()
def quantize_blockwise(
    W: Tensor,
    fmt: BlockwiseFormat,
    *,
    dtype: torch.dtype | None = None,
    search: bool = False,
    previous: Tensor | None = None,
) -> QuantizedBlockwise:
    """What ``bitsandbytes.functional.quantize_4bit`` stores for ``W``, on ``W``'s device.

    Or better, with a ``search`` for each block's absmax, which begins with the ``previous`` ones
    (as they are read back) if given. ``dtype`` is the one that the stored weight is to dequantize
    to, ``W``'s own unless given. A transposed view is copied once; beyond that, temporaries stay
    at a few chunks.
    """
    check_weight(W)
    flat, dtype = W.reshape(-1), dtype or W.dtype
    n, device, size = flat.numel(), W.device, fmt.block_size
    book = codebook(fmt.quant_type, fmt.bits)
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-n // size), dtype=torch.float32, device=device)
    for start, stop in _chunks(n):
        values, blocks = flat[start:stop].float(), slice(start // size, -(-stop // size))
        if search:
            around = None if previous is None else previous[blocks]
            whole = _whole_blocks(values, size)
            absmax[blocks] = search_absmax(whole, around, book, torch.finfo(dtype).max)
        else:
            scaled, absmax[blocks] = _scale_chunk(values, size)
            packed[start // 2 : (stop + 1) // 2] = _pack(scaled, book)
    shape = (W.shape[0], W.shape[1])
    stored = double_quantize(absmax, fmt)
    quantized = QuantizedBlockwise(packed.view(-1, 1), *stored, shape, fmt, dtype)
    if search:
        # The codes are those for the absmax that will be read back.
        absmax = restore_absmax(quantized)
        scale = 1.0 / absmax.abs().clamp(min=SMALLEST)
        scale = torch.where(absmax < 0, -scale, scale)
        for start, stop in _chunks(n):
            blocks = slice(start // size, -(-stop // size))
            whole = _whole_blocks(flat[start:stop].float(), size) * scale[blocks, None]
            packed[start // 2 : (stop + 1) // 2] = _pack(whole.view(-1)[: stop - start], book)
    return quantized


def double_quantize(
    absmax: Tensor, fmt: BlockwiseFormat
) -> tuple[Tensor, Tensor | None, float | Tensor | None]:
    """(absmax, nested absmax, nested offset) as they are stored; only the first unless asked for.

    The offset is torch's float32 mean, as in bitsandbytes: where there are more than 32768 blocks,
    its last bit depends on the number of threads.
    """
    if not fmt.double_quant:
        return absmax, None, None
    offset = absmax.mean()
    codes, nested_absmax = _quantize_dynamic(absmax - offset)
    return codes, nested_absmax, offset.item() if offset.device.type == "cpu" else offset


@torch.no_grad()
def dequantize_blockwise(q: QuantizedBlockwise) -> Tensor:
    """The weight that the runtime computes with: ``q.shape``, ``q.dtype``."""
    n, size, device = q.shape[0] * q.shape[1], q.format.block_size, q.packed.device
    levels = codebook(q.format.quant_type).level_tensor(device)
    absmax = restore_absmax(q)
    packed = q.packed.view(-1)
    out = torch.empty(n, dtype=q.dtype, device=device)
    for start, stop in _chunks(n):
        codes = packed[start // 2 : (stop + 1) // 2]
        values = levels[torch.stack((codes >> 4, codes & 0xF), dim=1).view(-1).int()]
        values = values[: stop - start]
        scales = absmax[start // size : -(-stop // size)]
        whole = values.numel() - values.numel() % size
        values[:whole].view(-1, size).mul_(scales[: whole // size, None])
        values[whole:].mul_(scales[whole // size :])
        out[start:stop] = values
    return out.view(q.shape)


@torch.no_grad()
def restore_absmax(q: QuantizedBlockwise) -> Tensor:
    """The absmax of every block as the runtime uses it: float32 (blocks,)."""
    if q.nested_absmax is None or q.nested_offset is None:
        return q.absmax
    scales = q.nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: q.absmax.numel()]
    return _dynamic_levels(q.absmax.device)[q.absmax.int()] * scales + q.nested_offset


def check_weight(W: Tensor) -> None:
    """A weight is a matrix of a dtype that checkpoints hold full precision in."""
    if W.ndim != 2:
        raise InvalidSetting(f"a weight of shape {tuple(W.shape)} is not a matrix")
    if W.numel() == 0:
        raise InvalidSetting(f"a weight of shape {tuple(W.shape)} is empty")
    if W.dtype not in SOURCE_DTYPES:
        raise InvalidSetting(f"a weight of {W.dtype} is not in float32, bfloat16 or float16")


@torch.no_grad()
def check_finite(W: Tensor) -> None:
    """Raise if ``W`` holds NaN or infinity, saying how many and where the first is."""
    if all(bound.isfinite() for bound in W.aminmax()):
        return
    bad = ~W.isfinite()
    row, column = divmod(int(bad.reshape(-1).int().argmax()), W.shape[1])
    raise NonFiniteWeight(
        f"{int(bad.sum())} of {W.numel()} values are NaN or infinite, the first at "
        f"row {row}, column {column}"
    )


def _chunks(n: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + _CHUNK, n)) for start in range(0, n, _CHUNK))


def _scale_chunk(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Values in [-1, 1] and absmax of whole blocks and at most one ragged one: bitsandbytes'."""
    whole = values.numel() - values.numel() % size
    blocks = values[:whole].view(-1, size)
    absmax = blocks.abs().amax(dim=1) if whole else values.new_zeros(0)
    # Times the reciprocal, not divided: the two differ in the last bit, which moves ties.
    scaled = blocks * (1.0 / absmax.clamp(min=SMALLEST)).view(-1, 1)
    scaled = scaled.clamp_(-1, 1).view(-1)
    if whole < values.numel():
        ragged = values[whole:]
        # It *stores* this one as it was used, unlike those of whole blocks.
        peak = ragged.abs().max().clamp(min=SMALLEST)
        absmax = torch.cat((absmax, peak.view(1)))
        # And here divided.
        scaled = torch.cat((scaled, (ragged / peak).clamp_(-1, 1)))
    return scaled, absmax


def _whole_blocks(values: Tensor, size: int) -> Tensor:
    """The values as blocks (count × size), the last filled up with zeros."""
    return torch.nn.functional.pad(values, (0, -values.numel() % size)).view(-1, size)


def pack(codes: Tensor) -> Tensor:
    """Codes (n,) as they are stored, (ceil(n / 2),): two a byte, beside an odd last one a 0."""
    codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2))
    return codes[0::2] << 4 | codes[1::2]


def _pack(scaled: Tensor, book: Codebook) -> Tensor:
    """The codes of the levels nearest to the values, an odd last one beside that of a zero."""
    scaled = torch.nn.functional.pad(scaled, (0, scaled.numel() % 2))
    nearest = torch.bucketize(scaled, book.midpoints(scaled.device), out_int32=True)
    return pack(book.order_tensor(scaled.device)[nearest])


def _quantize_dynamic(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the dynamic map, and the absmax of every 256 values: bitsandbytes' CPU kernel.

    That looks the code up in a table of 65536 steps over [-1, 1] instead of searching the map, so
    values nearer to zero than 1.5e-5 all share one code. A block of zeros is stored as code 0.
    """
    n = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -n % NESTED_BLOCK_SIZE)).view(
        -1, NESTED_BLOCK_SIZE
    )
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax).view(-1, 1)).clamp_(-1, 1)
    # One fused multiply-add there; in float64 product and sum are exact, and rounded once.
    step = (((scaled + 1.0) * 0.5).double() * 65535 + 0.5).float()
    # Zero times an infinite reciprocal.
    step = step.nan_to_num_(nan=0.0).int()
    codes = _dynamic_codes(values.device)[step].view(-1)[:n]
    return codes, absmax


@lru_cache(maxsize=8)
def _dynamic_codes(device: torch.device) -> Tensor:
    """The code nearest to each of the 65536 steps."""
    levels = dynamic_map()
    steps = (torch.arange(65536, dtype=torch.float64) / 65535 * 2 - 1).float()
    return torch.bucketize(steps, (levels[:-1] + levels[1:]) / 2).to(device, torch.uint8)


@lru_cache(maxsize=8)
def _dynamic_levels(device: torch.device) -> Tensor:
    return dynamic_map(device)
