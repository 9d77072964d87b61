"""This device's quantized layers: the 4-bit product, and int8."""

from __future__ import annotations

from typing import Any

from loftq_cli.checks.battery import Finding
from loftq_cli.checks.specimens import UPDATE, differs, short
from loftq_cli.errors import CheckFailed

# How near to halfway between two codes a value may go either way, in steps of one code.
_TIE = 1e-4


def four_bit(device: str) -> Finding:
    """A 4-bit linear layer in training and inference, against float64 products of its weight."""
    import torch

    figures: dict[str, float] = {}
    coarse = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = short(dtype)
        exact_enough = max(2 * torch.finfo(dtype).eps, 1e-4)
        errors = _layer_errors(device, dtype)
        # Inference has kernels of its own, and on a CPU with AVX512-BF16 they compute in bfloat16
        # whatever is asked for: coarser than training, and meant to be.
        limits = {
            "forward": exact_enough,
            "backward": exact_enough,
            "inference": max(exact_enough, 2 * torch.finfo(torch.bfloat16).eps),
        }
        for step, error in errors.items():
            if not error < limits[step]:
                raise CheckFailed(
                    f"{step} through a 4-bit layer is wrong in {name}",
                    cause=f"the result is {error:.2g} (relative) from the exact product with "
                    "the dequantized weight",
                    hint=UPDATE,
                )
            figures[f"{step}_error_relative_{name}"] = error
        if errors["inference"] > exact_enough:
            coarse.append(name)
    training = max(v for k, v in figures.items() if not k.startswith("inference"))
    inference = max(v for k, v in figures.items() if k.startswith("inference"))
    return Finding(
        f"products within {training:.1e} of the exact ones in training, "
        f"{inference:.1e} in inference"
        + (f" (which rounds {' and '.join(coarse)} to bfloat16 here)" if coarse else ""),
        figures,
    )


def _layer_errors(device: str, dtype: Any) -> dict[str, float]:
    """The largest relative error of each step, over one row and several (GPUs tell them apart)."""
    import torch
    from bitsandbytes import functional as bnb
    from bitsandbytes.nn import Linear4bit, Params4bit

    generator = torch.Generator().manual_seed(0)
    W = torch.randn(192, 256, generator=generator).mul_(0.02).to(dtype)
    linear = Linear4bit(256, 192, bias=False, compute_dtype=dtype, quant_type="nf4")
    linear.weight = Params4bit(W, False, quant_type="nf4", compress_statistics=False)
    linear = linear.to(device)
    # Before the first inference, which packs the codes in another order on some CPUs.
    Q = bnb.dequantize_4bit(linear.weight.data, linear.weight.quant_state).double()
    inputs = [torch.randn(rows, 256, generator=generator).to(device, dtype) for rows in (1, 7)]
    found = []
    for x in inputs:
        x.requires_grad_()
        y = linear(x)
        y.sum().backward()
        found.append(("forward", y.detach(), x.detach().double() @ Q.T))
        found.append(("backward", x.grad, Q.sum(dim=0).expand_as(x)))
    linear.eval()
    with torch.no_grad():
        for x in inputs:
            x = x.detach()
            found.append(("inference", linear(x), x.double() @ Q.T))
    errors: dict[str, float] = {}
    for step, value, exact in found:
        error = float((value.double() - exact).norm() / exact.norm())
        # NaN must not lose against a number.
        errors[step] = max(errors.get(step, 0.0), error if error == error else float("inf"))
    return errors


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
        raise differs(f"the scale of row {row}", f"{theirs:.9g}", f"{expected:.9g}")
    different = codes != ours.codes
    scaled = W.float() * (127.0 / ours.scb[:, None])
    tie = (scaled - scaled.floor() - 0.5).abs() < _TIE
    wrong = different & ~(tie & ((codes.int() - ours.codes.int()).abs() == 1))
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise differs(
            f"the code in row {row}, column {column}",
            str(int(codes[row, column])),
            str(int(ours.codes[row, column])),
        )
    if not torch.equal(bnb.int8_vectorwise_dequant(ours.codes, ours.scb), dequantize_int8(ours)):
        raise CheckFailed(
            "int8 codes are read differently here",
            cause="bitsandbytes dequantizes them to other values than the reference",
            hint=UPDATE,
        )
    ties = int(different.sum())
    return Finding(
        f"{W.numel():,} codes and values equal the reference's, over all 255 codes"
        + (f", {ties} of them ties that went the other way" if ties else ""),
        {"codes_compared": W.numel(), "ties_decided_otherwise": ties},
    )
