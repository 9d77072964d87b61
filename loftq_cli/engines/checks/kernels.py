"""This device's 4-bit and int8 kernels against the readable reference, code for code.

What bitsandbytes runs depends on the device: compiled loops on a CPU (other ones with AVX512),
CUDA kernels on a GPU. `loftq` writes codes by the reference and measures every residual against
what the reference dequantizes them to, so a device that reads them differently corrects errors
that it does not have.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from loftq_cli.engines.checks.battery import Finding
from loftq_cli.errors import CheckFailed

if TYPE_CHECKING:
    from torch import Tensor

    from loftq_cli.core.blockwise import BlockwiseFormat, QuantizedBlockwise

_BLOCKS = 128
_UPDATE = "pip install -U bitsandbytes; until this check passes, do not trust 4-bit on this device"
# A scaled value this near to the border between two levels may go either way: GPUs multiply with
# an approximate reciprocal. The two levels are then equally near.
_TIE = 2.0**-21
# Of a product whose factors are exact: rounding its result, and sums in a register of that width.
_PRODUCT_EPS = 8


def quantization(device: str) -> Finding:
    """Codes and scales that bitsandbytes computes here, against the reference's."""
    import torch
    from bitsandbytes import functional as bnb

    from loftq_cli.core.blockwise import quantize_blockwise

    codes = ties = formats = 0
    for fmt, dtype in _formats():
        W = _edge_cases(fmt, dtype).to(device)
        ours = quantize_blockwise(W, fmt)
        packed, state = bnb.quantize_4bit(W, blocksize=fmt.block_size, quant_type=fmt.quant_type)
        where = _named(fmt, dtype)
        if not torch.equal(state.absmax, ours.absmax):
            block = int((state.absmax != ours.absmax).nonzero()[0])
            raise _differs(
                f"the scale of block {block} of {where}",
                f"{float(state.absmax[block]):.9g}",
                f"{float(ours.absmax[block]):.9g}",
            )
        ties += _compare_codes(W, ours, packed.view(-1, 1), where)
        codes += W.numel()
        formats += 1
    return Finding(
        f"{codes:,} codes agree in {formats} formats"
        + (f", {ties} of them ties that went the other way" if ties else ""),
        {"codes_compared": codes, "formats": formats, "ties_decided_otherwise": ties},
    )


def dequantization(device: str) -> Finding:
    """What bitsandbytes makes of stored codes here, against the reference, bit for bit."""
    import torch
    from bitsandbytes import functional as bnb

    from loftq_cli.core.blockwise import dequantize_blockwise

    values = formats = 0
    for fmt, dtype in _formats():
        for double in (False, True):
            stored = _all_codes(fmt, dtype, device, double)
            ours = dequantize_blockwise(stored)
            theirs = bnb.dequantize_4bit(stored.packed, quant_state(stored))
            if not torch.equal(ours, theirs):
                at = int((ours != theirs).view(-1).nonzero()[0])
                scales = ", double quantization" if double else ""
                raise _differs(
                    f"value {at % fmt.block_size} of block {at // fmt.block_size} of "
                    f"{_named(fmt, dtype)}{scales}",
                    f"{float(theirs.view(-1)[at]):.9g}",
                    f"{float(ours.view(-1)[at]):.9g}",
                )
            values += ours.numel()
            formats += 1
    rate = _dequantization_rate(device)
    return Finding(
        f"{values:,} values agree in {formats} formats; {rate / 1e9:.3g} GB/s",
        {"values_compared": values, "formats": formats, "output_bytes_per_second": rate},
    )


def layer(device: str) -> Finding:
    """A 4-bit linear layer, forwards and backwards, against float64 products of its weight."""
    import bitsandbytes
    import torch
    from bitsandbytes import functional as bnb

    generator = torch.Generator().manual_seed(0)
    worst: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = _short(dtype)
        W = torch.randn(192, 256, generator=generator).mul_(0.02).to(dtype)
        four_bit = bitsandbytes.nn.Linear4bit(
            256, 192, bias=False, compute_dtype=dtype, quant_type="nf4", compress_statistics=False
        )
        four_bit.weight = bitsandbytes.nn.Params4bit(
            W, requires_grad=False, quant_type="nf4", compress_statistics=False
        )
        four_bit = four_bit.to(device)
        # Before the first forward pass: on some CPUs that packs the codes in another order.
        Q = bnb.dequantize_4bit(four_bit.weight.data, four_bit.weight.quant_state).double()
        for rows in (1, 7):  # one row has a kernel of its own on GPUs
            x = torch.randn(rows, 256, generator=generator).to(device, dtype).requires_grad_()
            y = four_bit(x)
            y.sum().backward()
            with torch.no_grad():
                forward = _relative_difference(y, x.double() @ Q.T)
                backward = _relative_difference(x.grad, Q.sum(dim=0).expand(rows, -1))
                inference = _relative_difference(four_bit.eval()(x.detach()), x.double() @ Q.T)
                four_bit.train()
            for step, error in (
                ("forward", max(forward, inference)),
                ("backward", backward),
            ):
                if not error < _PRODUCT_EPS * torch.finfo(dtype).eps:
                    raise CheckFailed(
                        f"the 4-bit layer's {step} pass is wrong in {name}",
                        cause=f"its result for {rows} rows is {error:.2g} from the exact product",
                        hint=_UPDATE,
                    )
                worst[name] = max(worst.get(name, 0.0), error)
    return Finding(
        "largest relative error "
        + ", ".join(f"{error:.1e} in {name}" for name, error in worst.items()),
        {f"relative_error_{name}": error for name, error in worst.items()},
    )


def int8(device: str) -> Finding:
    """int8 codes, row scales and values that bitsandbytes computes here."""
    import torch
    from bitsandbytes import functional as bnb

    from loftq_cli.core.int8 import dequantize_int8, quantize_int8

    generator = torch.Generator().manual_seed(0)
    steps = torch.arange(-127, 128, dtype=torch.float32)
    halves = steps[:-1] + 0.5
    exact = torch.cat((steps, halves, torch.tensor([127.0, -127.0, 0.0]))).expand(16, -1)
    scales = 2.0 ** torch.arange(-12, 4)
    W = torch.cat((exact * scales[:, None], torch.randn(64, exact.shape[1], generator=generator)))
    # The kernels of every device take float16, and some take nothing else.
    W = W.to(device, torch.float16)
    ours = quantize_int8(W)
    codes, scb, _ = bnb.int8_vectorwise_quant(W)
    if not torch.equal(scb.view(-1), ours.scb):
        row = int((scb.view(-1) != ours.scb).nonzero()[0])
        theirs, expected = float(scb.view(-1)[row]), float(ours.scb[row])
        raise _differs(f"the scale of row {row}", f"{theirs:.9g}", f"{expected:.9g}")
    different = codes != ours.codes
    scaled = W.float() * (127.0 / ours.scb[:, None])
    tie = (scaled - scaled.floor() - 0.5).abs() < 127 * _TIE
    wrong = different & ~(tie & ((codes.int() - ours.codes.int()).abs() == 1))
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise _differs(
            f"the code in row {row}, column {column}",
            str(int(codes[row, column])),
            str(int(ours.codes[row, column])),
        )
    if not torch.equal(
        bnb.int8_vectorwise_dequant(ours.codes, ours.scb), dequantize_int8(ours)
    ):
        raise CheckFailed(
            "int8 codes are read differently here",
            cause="bitsandbytes dequantizes them to other values than the reference",
            hint=_UPDATE,
        )
    ties = int(different.sum())
    return Finding(
        f"{W.numel():,} codes and values agree over all 255 codes"
        + (f", {ties} of them ties that went the other way" if ties else ""),
        {"codes_compared": W.numel(), "ties_decided_otherwise": ties},
    )


def quant_state(stored: QuantizedBlockwise) -> Any:
    """bitsandbytes' description of a weight that the reference stored."""
    import torch
    from bitsandbytes.functional import QuantState

    from loftq_cli.core.blockwise import NESTED_BLOCK_SIZE
    from loftq_cli.core.codebooks import codebook, dynamic_map

    device = stored.packed.device
    nested: dict[str, Any] = {}
    if stored.nested_absmax is not None:
        nested["offset"] = torch.tensor(stored.nested_offset, device=device)
        nested["state2"] = QuantState(
            absmax=stored.nested_absmax,
            blocksize=NESTED_BLOCK_SIZE,
            code=dynamic_map(device),
            dtype=torch.float32,
        )
    return QuantState(
        absmax=stored.absmax,
        shape=torch.Size(stored.shape),
        code=codebook(stored.format.quant_type).level_tensor(device),
        blocksize=stored.format.block_size,
        quant_type=stored.format.quant_type,
        dtype=stored.dtype,
        **nested,
    )


def _formats() -> Iterator[tuple[BlockwiseFormat, Any]]:
    from loftq_cli.core.blockwise import BLOCK_SIZES, SOURCE_DTYPES, BlockwiseFormat

    for quant_type in ("nf4", "fp4"):
        for block_size in BLOCK_SIZES:
            for dtype in SOURCE_DTYPES:
                yield BlockwiseFormat(quant_type, block_size), dtype  # type: ignore[arg-type]


def _edge_cases(fmt: BlockwiseFormat, dtype: Any) -> Tensor:
    """A weight of 128 blocks with every level, every border between two levels and its two
    neighbours, at the edges of blocks and inside them; absmax at either end; a block of zeros.

    Every other block is scaled by a power of two, so that what lies on a border stays there.
    """
    import torch

    from loftq_cli.core.codebooks import codebook

    book = codebook(fmt.quant_type)
    borders = book.midpoints()
    above, below = torch.nextafter(borders, borders + 1), torch.nextafter(borders, borders - 1)
    special = torch.cat((borders, above, below, book.level_tensor()))
    generator = torch.Generator().manual_seed(fmt.block_size)
    blocks = torch.rand(_BLOCKS, fmt.block_size, generator=generator) * 1.98 - 0.99
    number = torch.arange(_BLOCKS)
    for shift, column in enumerate((0, -1, *range(1, 16))):
        blocks[:, column] = special[(number + 7 * shift) % len(special)]
    peak = torch.tensor((0, fmt.block_size - 1, fmt.block_size // 2))[number % 3]
    blocks[number, peak] = 1.0 - 2.0 * (number // 3 % 2)
    scale = torch.rand(_BLOCKS, generator=generator) + 0.01
    scale[::2] = 2.0 ** (number[::2] % 13 - 8)
    blocks *= scale[:, None]
    blocks[5] = 0.0
    return blocks.view(_BLOCKS // 2, 2 * fmt.block_size).to(dtype)


def _all_codes(
    fmt: BlockwiseFormat, dtype: Any, device: str, double: bool
) -> QuantizedBlockwise:
    """A stored weight in which every pair of codes occurs, with scales of many sizes."""
    from dataclasses import replace

    import torch

    from loftq_cli.core.blockwise import QuantizedBlockwise

    generator = torch.Generator().manual_seed(fmt.block_size)
    count = _BLOCKS * fmt.block_size // 2
    packed = torch.arange(count).remainder(256)[torch.randperm(count, generator=generator)]
    nested_absmax = nested_offset = None
    if double:
        absmax = torch.arange(_BLOCKS).mul(2).add(1).to(torch.uint8)
        nested_absmax, nested_offset = torch.tensor([0.37], device=device), 0.5
    else:
        absmax = torch.rand(_BLOCKS, generator=generator) * 2.0 ** (torch.arange(_BLOCKS) % 24 - 20)
        absmax[5] = 0.0
    return QuantizedBlockwise(
        packed.to(device, torch.uint8).view(-1, 1),
        absmax.to(device),
        nested_absmax,
        nested_offset,
        (_BLOCKS // 2, 2 * fmt.block_size),
        replace(fmt, double_quant=double),
        dtype,
    )


def _compare_codes(W: Tensor, ours: QuantizedBlockwise, packed: Tensor, where: str) -> int:
    """How many ties were decided otherwise; any other difference is an error."""
    import torch

    if torch.equal(packed, ours.packed):
        return 0
    from loftq_cli.core.codebooks import codebook

    size = ours.format.block_size
    levels = codebook(ours.format.quant_type).level_tensor(W.device)
    scaled = (W.float().view(-1, size) / ours.absmax.clamp(min=1e-38)[:, None]).view(-1)
    theirs, expected = (
        torch.cat((p >> 4, p & 15), dim=1).view(-1).int() for p in (packed, ours.packed)
    )
    distance = (scaled - levels[theirs]).abs() - (scaled - levels[expected]).abs()
    wrong = (theirs != expected) & (distance.abs() > _TIE)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise _differs(
            f"code {at % size} of block {at // size} of {where}",
            str(int(theirs[at])),
            f"{int(expected[at])} ({int(wrong.sum())} of {scaled.numel()} differ)",
        )
    return int((theirs != expected).sum())


def _dequantization_rate(device: str) -> float:
    """Bytes of bfloat16 weight a second, the best of three."""
    import torch
    from bitsandbytes import functional as bnb

    W = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.quantize_4bit(W.to(device, torch.bfloat16), quant_type="nf4")
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        bnb.dequantize_4bit(packed, state)[-1, -1].item()  # which waits for a GPU to be done
        seconds.append(time.perf_counter() - began)
    return 2 * W.numel() / min(seconds)


def _relative_difference(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def _named(fmt: BlockwiseFormat, dtype: Any) -> str:
    return f"{fmt.quant_type}, block size {fmt.block_size}, {_short(dtype)}"


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _differs(what: str, kernel: str, reference: str) -> CheckFailed:
    return CheckFailed(
        "the kernel of this device and the reference disagree",
        cause=f"{what}: the kernel says {kernel}, the reference {reference}",
        hint=_UPDATE,
    )
