"""This device's 4-bit kernels against the readable reference, value for value.

What bitsandbytes runs depends on the device: compiled loops on a CPU (other ones with AVX512),
CUDA kernels on a GPU. `loftq` writes codes by the reference and measures every residual against
what the reference dequantizes them to, so a device that reads them differently corrects errors
that it does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loftq_cli.checks.battery import Finding, NothingToCheck
from loftq_cli.checks.rates import fastest
from loftq_cli.checks.specimens import (
    all_codes,
    differs,
    edge_cases,
    formats,
    integer_edge_cases,
    integer_formats,
    quant_state,
    short,
)
from loftq_cli.errors import CheckFailed

if TYPE_CHECKING:
    from torch import Tensor

    from loftq_cli.core.blockwise import BlockwiseFormat, QuantizedBlockwise
    from loftq_cli.core.quantizers import BlocksQuantizer

# A scaled value this near to the border between two levels may go either way: GPUs multiply with
# an approximate reciprocal. The two levels are then equally near.
_TIE = 2.0**-20
_COMPILED_VALUES = 1 << 17
# Of the sizes of blocks the one with which the column loops are compared: they do not depend on it.
_COLUMNS = 64


def quantization(device: str) -> Finding:
    """Codes and scales that bitsandbytes computes here, against the reference's."""
    import torch
    from bitsandbytes import functional as bnb

    from loftq_cli.core.blockwise import quantize_blockwise

    codes = synonyms = ties = count = 0
    for fmt, dtype in formats():
        W = edge_cases(fmt, dtype).to(device)
        ours = quantize_blockwise(W, fmt)
        packed, state = bnb.quantize_4bit(W, blocksize=fmt.block_size, quant_type=fmt.quant_type)
        where = _named(fmt, dtype)
        if not torch.equal(state.absmax, ours.absmax):
            block = int((state.absmax != ours.absmax).nonzero()[0])
            raise differs(
                f"the scale of block {block} of {where}",
                f"{float(state.absmax[block]):.9g}",
                f"{float(ours.absmax[block]):.9g}",
            )
        same_value, tied = _compare_codes(W, ours, packed.view(-1, 1), where)
        synonyms, ties = synonyms + same_value, ties + tied
        codes += W.numel()
        count += 1
    return Finding(
        f"{codes:,} codes and their scales equal the reference's in {count} formats"
        + (f", {synonyms:,} of them other codes of the same value" if synonyms else "")
        + (f", {ties} of them ties that went the other way" if ties else ""),
        {"codes_compared": codes, "formats": count, "ties_decided_otherwise": ties},
    )


def dequantization(device: str) -> Finding:
    """What bitsandbytes makes of stored codes here, against the reference, bit for bit."""
    import torch
    from bitsandbytes import functional as bnb

    from loftq_cli.core.blockwise import dequantize_blockwise

    values = count = 0
    for fmt, dtype in formats():
        for double in (False, True):
            stored = all_codes(fmt, dtype, device, double)
            ours = dequantize_blockwise(stored)
            # Where bitsandbytes has no kernel it compiles one, which takes longer than all else.
            with torch.compiler.set_stance("force_eager"):
                theirs = bnb.dequantize_4bit(stored.packed, quant_state(stored))
            if not torch.equal(ours, theirs):
                at = int((ours != theirs).view(-1).nonzero()[0])
                scales = ", double quantization" if double else ""
                raise differs(
                    f"value {at % fmt.block_size} of block {at // fmt.block_size} of "
                    f"{_named(fmt, dtype)}{scales}",
                    f"{float(theirs.view(-1)[at]):.9g}",
                    f"{float(ours.view(-1)[at]):.9g}",
                )
            values += ours.numel()
            count += 1
    rate = _dequantization_rate(device)
    return Finding(
        f"{values:,} values equal the reference's in {count} formats; {rate / 1e9:.3g} GB/s",
        {"values_compared": values, "formats": count, "output_bytes_per_second": rate},
    )


def compiled(device: str) -> Finding:
    """loftq's own compiled loops, made for this processor or GPU, against the reference."""
    from loftq_cli.core.quantizers import Blockwise, Integers

    values = count = 0
    for fmt, dtype in formats():
        if _left_out(fmt.block_size, dtype, device):
            continue
        W = edge_cases(fmt, dtype).view(-1, 4096).to(device)
        parts = {"code pair": "packed", "scale": "absmax"}
        values += _compiled(Blockwise(fmt), W, parts, _named(fmt, dtype))
        if fmt.block_size == _COLUMNS:
            values += _columns(Blockwise(fmt), W, _named(fmt, dtype))
        count += 1
    for whole, dtype in integer_formats():
        if _left_out(whole.block_size, dtype, device):
            continue
        size = whole.block_size or "of a row"
        W = integer_edge_cases(whole, dtype).to(device)
        named = f"int{whole.bits}, block size {size}, {short(dtype)}"
        values += _compiled(Integers(whole), W, {"code": "codes", "scale": "scales"}, named)
        if whole.block_size == _COLUMNS:
            values += _columns(Integers(whole), W, named)
        count += 1
    return Finding(
        f"{values:,} codes, scales and residuals equal the reference's in {count} formats",
        {"values_compared": values, "formats": count},
    )


def _left_out(block_size: int | None, dtype: Any, device: str) -> bool:
    """Whether a GPU is spared this: it compiles a kernel for every block size and dtype, half a
    second each. All sizes come in bfloat16, and all dtypes in one size."""
    import torch

    return device != "cpu" and dtype != torch.bfloat16 and block_size != _COLUMNS


def _compiled(quantizer: BlocksQuantizer, W: Tensor, parts: Mapping[str, str], named: str) -> int:
    """The values of a weight whose stored ``parts`` and residual are those of the reference."""
    from loftq_cli.core.steps import ReferenceSteps

    # A small weight is left to the reference itself.
    repeats: int = -(-_COMPILED_VALUES // W.numel())
    W = W.repeat(repeats, 1)
    if W.is_cuda:
        # The sums of a search are added up in another order there.
        quantizer = quantizer.plain()
    steps = quantizer.steps(W)
    if isinstance(steps, ReferenceSteps):
        raise NothingToCheck(_no_loops(W))
    stored, residual = steps.quantize()
    expected, rest = replace(quantizer, readable=True).steps(W).quantize()
    compared = [
        (what, getattr(stored, name), getattr(expected, name)) for what, name in parts.items()
    ]
    for what, ours, reference in (*compared, ("residual", residual.matrix, rest.matrix)):
        _check_same(ours, reference, what, named)
    count: int = W.numel()
    return count


def _columns(quantizer: BlocksQuantizer, W: Tensor, named: str) -> int:
    """The codes of a weight for which the column loops of calibrated starts are the reference's.

    Columns pass nothing on here, so there are no sums that could be added up in another order.
    """
    import torch

    from loftq_cli.core import columns
    from loftq_cli.core.gptq import Grid, column_loops

    blocks = W.float().reshape(-1, _COLUMNS).t().contiguous()
    grid = Grid.of(quantizer.levels, _COLUMNS, blocks, quantizer.largest(W.dtype))
    scales = grid.possible(blocks.abs().amax(dim=0) / grid.book.outermost)
    scales = scales.clamp_(1e-30).expand_as(blocks).contiguous()
    alone, zero = torch.eye(_COLUMNS, device=W.device), int((grid.levels == 0).int().argmax())
    found = []
    for loops in (column_loops(W.repeat(-(-_COMPILED_VALUES // W.numel()), 1), grid), columns):
        codes = torch.zeros_like(blocks, dtype=torch.uint8)
        values = loops.pass_on(blocks, scales, alone, grid, codes)
        better = torch.full_like(codes, zero)
        moved, _ = loops.improve(blocks, scales, alone, grid, better)
        found.append((codes, values, better, moved))
    whats = "rounded code", "rounded value", "improved code", "improved value"
    for what, ours, reference in zip(whats, *found, strict=True):
        _check_same(ours, reference, what, named)
    count: int = blocks.numel()
    return count


def _check_same(ours: Tensor, reference: Tensor, what: str, named: str) -> None:
    """Raise unless they are equal, with the first place where they are not."""
    import torch

    if torch.equal(ours, reference):
        return
    at = int((ours != reference).view(-1).int().argmax())
    raise CheckFailed(
        "loftq's compiled loops and the reference disagree",
        cause=f"{what} {at} of {named}: {float(ours.view(-1)[at]):.9g} and "
        f"{float(reference.view(-1)[at]):.9g}",
        hint="please report it, with this processor's name",
    )


def _no_loops(W: Tensor) -> str:
    """Why nothing is compiled for this device."""
    from loftq_cli.core.cuda_step import obstacle

    if W.is_cuda:
        return f"Triton cannot compile for this GPU, so quantizing is slow: {obstacle(W.device)}"
    return "the compiled loops are for CPUs and CUDA"


def _compare_codes(
    W: Tensor, ours: QuantizedBlockwise, packed: Tensor, where: str
) -> tuple[int, int]:
    """How many codes differ and mean the same number, and how many ties were decided otherwise.

    Any other difference is an error. Two codes mean the same number where their levels are equal
    (FP4 has +0 and -0), and in a block whose absmax is 0: CUDA kernels store other ones there.
    """
    import torch

    if torch.equal(packed, ours.packed):
        return 0, 0
    from loftq_cli.core.codebooks import codebook

    size = ours.format.block_size
    levels = codebook(ours.format.quant_type).level_tensor(W.device)
    theirs, expected = (
        torch.cat((p >> 4, p & 15), dim=1).view(-1, size).int() for p in (packed, ours.packed)
    )
    absmax = ours.absmax[:, None]
    differ = (levels[theirs] != levels[expected]) & (absmax != 0)
    scaled = W.float().view(-1, size) / absmax
    distance = (scaled - levels[theirs]).abs() - (scaled - levels[expected]).abs()
    wrong = (differ & (distance.abs() > _TIE)).view(-1)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise differs(
            f"code {at % size} of block {at // size} of {where}",
            str(int(theirs.view(-1)[at])),
            f"{int(expected.view(-1)[at])} ({int(wrong.sum())} of {wrong.numel()} differ)",
        )
    return int(((theirs != expected) & ~differ).sum()), int(differ.sum())


def _dequantization_rate(device: str) -> float:
    """Bytes of bfloat16 weight a second."""
    import torch
    from bitsandbytes import functional as bnb

    W = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.quantize_4bit(W.to(device, torch.bfloat16), quant_type="nf4")
    return 2 * 2048**2 / fastest(lambda: bnb.dequantize_4bit(packed, state), device)


def _named(fmt: BlockwiseFormat, dtype: Any) -> str:
    return f"{fmt.quant_type}, block size {fmt.block_size}, {short(dtype)}"
