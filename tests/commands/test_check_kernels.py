"""`loftq check` and kernels that store other codes: of the same values, and of wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor

from loftq_cli.checks import all as all_checks
from loftq_cli.checks import kernels, roundtrip, specimens
from loftq_cli.checks.battery import Check
from loftq_cli.containers import packing
from loftq_cli.containers.gptq import Gptq
from loftq_cli.core import steps
from loftq_cli.core.blockwise import BlockwiseFormat
from loftq_cli.core.integers import IntegerFormat, quantize_integers
from loftq_cli.errors import CheckFailed
from tests.commands.test_check import by_name
from tests.conftest import Outcome

Loftq = Callable[..., Outcome]
# Takes the codes (blocks × size) and the absmax that bitsandbytes stores, and changes them.
Change = Callable[[Tensor, Tensor], None]
ZERO_BLOCK = 5


@pytest.fixture
def check_with(loftq: Loftq, monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], Outcome]:
    """Runs `check`, of the 4-bit quantization only, on a kernel that stores something else."""
    some = [
        (BlockwiseFormat(quant_type, size), dtype)
        for quant_type, size, dtype in (
            ("nf4", 32, torch.float32),
            ("nf4", 64, torch.bfloat16),
            ("fp4", 32, torch.float16),
        )
    ]
    check = Check("4-bit quantization", "g", "v", partial(kernels.quantization, "cpu"))
    monkeypatch.setattr(kernels, "formats", lambda: iter(some))
    monkeypatch.setattr(all_checks, "hardware_checks", lambda device: [check])
    monkeypatch.setattr(all_checks, "model_checks", lambda subject: [])
    monkeypatch.setattr(all_checks, "main_job_checks", lambda trip: [])
    honest = bnb.functional.quantize_4bit

    def run(change: Change) -> Outcome:
        def quantize_4bit(*arguments: Any, **options: Any) -> Any:
            packed, state = honest(*arguments, **options)
            pairs = packed.view(-1, 1)
            codes = torch.cat((pairs >> 4, pairs & 15), dim=1).view(-1, state.blocksize)
            change(codes, state.absmax)
            codes = codes.view(-1, 2)
            return (codes[:, :1] << 4 | codes[:, 1:]).view_as(packed), state

        monkeypatch.setattr(bnb.functional, "quantize_4bit", quantize_4bit)
        return loftq("check", "--json", "--quiet")

    return run


def store_as_cuda(codes: Tensor, absmax: Tensor) -> None:
    """What was seen on an H200: code 0 in blocks of zeros, and -0 for FP4's small values."""
    is_fp4 = int(codes[ZERO_BLOCK, 0]) == 0  # in NF4 code 7 is the zero
    codes[absmax == 0] = 0
    if is_fp4:
        codes[(codes == 0) & (absmax != 0)[:, None]] = 8


def test_codes_of_the_same_values_pass(check_with: Callable[[Change], Outcome]) -> None:
    done = check_with(store_as_cuda)
    assert (done.code, done.err) == (0, "")
    test = by_name(done.out)["4-bit quantization"]
    assert test["status"] == "passed"
    assert "of them other codes of the same value" in test["detail"]
    assert test["figures"]["ties_decided_otherwise"] == 0


def one_code_off(codes: Tensor, absmax: Tensor) -> None:
    codes[3, 20] ^= 1


def an_ulp_off(codes: Tensor, absmax: Tensor) -> None:
    absmax[3] = torch.nextafter(absmax[3], absmax[3] + 1)


def zeros_with_a_scale(codes: Tensor, absmax: Tensor) -> None:
    """The code of a block of zeros is any, and then the block is no longer zero."""
    codes[ZERO_BLOCK] = 1
    absmax[ZERO_BLOCK] = 2.0**-20


def a_zero_among_others(codes: Tensor, absmax: Tensor) -> None:
    """Code 0 is zero in FP4, and -1 in NF4."""
    codes[3, 20] = 0


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (one_code_off, "code 20 of block 3"),
        (an_ulp_off, "the scale of block 3"),
        (zeros_with_a_scale, "the scale of block 5"),
        (a_zero_among_others, "code 20 of block 3"),
    ],
)
def test_codes_of_other_values_fail(
    change: Change, place: str, check_with: Callable[[Change], Outcome]
) -> None:
    done = check_with(change)
    assert done.code == 3
    test = by_name(done.out)["4-bit quantization"]
    assert test["status"] == "failed"
    assert f"{place} of nf4, block size 32, float32: the kernel says" in test["cause"]


def test_two_zeros_are_the_same_in_fp4_only(check_with: Callable[[Change], Outcome]) -> None:
    def swap(codes: Tensor, absmax: Tensor) -> None:
        codes[codes == 0] = 8

    done = check_with(swap)
    assert done.code == 3
    assert " of nf4, block size 32" in by_name(done.out)["4-bit quantization"]["cause"]


# --- integers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_border_between_integers_occurs_where_a_scale_is_exact(bits: int) -> None:
    fmt = IntegerFormat(bits, 32)
    W = specimens.integer_edge_cases(fmt, torch.float32).view(-1, 32)
    stored = quantize_integers(W, fmt)
    exact = (torch.frexp(stored.scales).mantissa == 0.5).view(-1)
    assert exact.sum() >= 64
    in_steps = (W / stored.scales)[exact]
    half = 1 << (bits - 1)
    borders = torch.arange(1 - half, half) - 0.5
    assert set(borders.tolist()) <= set(in_steps.view(-1).tolist())
    assert set(stored.codes.view(-1).tolist()) == set(range(-half, half))
    assert (stored.scales[5] == 0).all()


def test_compiled_integers_that_store_something_else_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "formats", lambda: iter(()))
    some = [(IntegerFormat(3, 64), torch.bfloat16), (IntegerFormat(8, None), torch.float32)]
    monkeypatch.setattr(kernels, "integer_formats", lambda: iter(some))
    assert kernels.compiled("cpu").figures["formats"] == 2
    reference = steps.ReferenceSteps.quantize

    def off(self: Any, *given: Any, **options: Any) -> Any:
        stored, residual = reference(self, *given, **options)
        stored.codes.view(-1)[-1] ^= 1
        return stored, residual

    monkeypatch.setattr(steps.ReferenceSteps, "quantize", off)
    with pytest.raises(CheckFailed) as raised:
        kernels.compiled("cpu")
    assert "of int3, block size 64, bfloat16" in str(raised.value.cause)


def test_integers_make_the_round_trip() -> None:
    found = roundtrip.integers("cpu")
    layers = 2 * 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    assert found.figures["values_compared"] == layers
    assert found.figures["largest_difference"] < 1e-6


@pytest.mark.parametrize(
    ("what", "told"),
    [("codes", "is not what quantize measured"), ("scales", "other weights of")],
)
def test_a_round_trip_that_changes_something_is_found(
    what: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "codes":  # in the file, where reader and reference agree on them
        pack = packing.pack
        monkeypatch.setattr(packing, "pack", lambda codes, bits: pack(codes.flip(1), bits))
    else:  # in what the reader makes of them
        runtime = Gptq.runtime
        monkeypatch.setattr(Gptq, "runtime", lambda self, stored: runtime(self, stored) * 2)
    with pytest.raises(CheckFailed, match=told):
        roundtrip.integers("cpu")
