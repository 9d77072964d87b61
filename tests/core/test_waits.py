"""What a GPU is waited for: once an iteration, and the GPU goes on by itself from there."""

# ruff: noqa: E402

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

if "triton" not in sys.modules and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
triton = pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from loftq_cli.core import blockwise, triton_kernels
from loftq_cli.core.blockwise import BlockwiseFormat
from loftq_cli.core.cuda_step import TritonSteps
from loftq_cli.core.integers import IntegerFormat
from loftq_cli.core.loftq import initialize
from loftq_cli.core.quantizers import BlocksQuantizer, Blockwise, Integers
from loftq_cli.core.residual import Residual
from loftq_cli.core.steps import Steps
from tests.core.elsewhere import DEVICE, Elsewhere, There

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
INTERPRETED = not isinstance(triton_kernels.step, triton.JITFunction)
here_only = pytest.mark.skipif(not INTERPRETED, reason="triton was imported to compile")

FORMATS = {
    "nf4": Blockwise(BlockwiseFormat("nf4", 64)),
    "nf4, double": Blockwise(BlockwiseFormat("nf4", 64, double_quant=True)),
    "int4": Integers(IntegerFormat(4, 64)),
}


def weight() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    left = torch.randn(64, 6, generator=generator)
    noise = 0.02 * torch.randn(64, 128, generator=generator)
    return noise + 0.004 * left @ torch.randn(6, 128, generator=generator)


class Unseen:
    """A kernel that works on tensors which are not here."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            values = (each.values if isinstance(each, There) else each for each in arguments)
            with _disable_current_modes():
                self.kernel[grid](*values, **options)

        return launch


class _OnTriton(BlocksQuantizer):
    """What CUDA weights get."""

    def steps(self, W: Tensor, *, rounded: bool = False) -> Steps:
        return TritonSteps(W, self.format, self.dtype or W.dtype, search=self.search)


class _Blockwise(_OnTriton, Blockwise):
    pass


class _Integers(_OnTriton, Integers):
    pass


def on_triton(name: str) -> BlocksQuantizer:
    quantizer = FORMATS[name]
    kind = _Blockwise if isinstance(quantizer, Blockwise) else _Integers
    return kind(quantizer.format)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    for name in ("step", "leave"):
        monkeypatch.setattr(triton_kernels, name, Unseen(getattr(triton_kernels, name)))
    return Elsewhere()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One for each pass of an SVD; and for each error that is measured, which this weight's are
    once its low rank holds nearly all of the residual."""
    found: list[int] = []

    def count(kind: type, name: str) -> None:
        real = getattr(kind, name)

        def counted(*arguments: Any) -> Any:
            found.append(1)
            return real(*arguments)

        monkeypatch.setattr(kind, name, counted)

    count(Residual, "_products")
    count(TritonSteps, "remainder")
    return found


@here_only
@pytest.mark.parametrize("name", FORMATS)
def test_an_iteration_waits_once_for_each_pass(
    name: str, device: Elsewhere, passes: list[int]
) -> None:
    """And ends where that of the reference does, on a device that nothing is seen of."""
    waits, passed = [], []
    with device:  # tables that are sent once
        blockwise._dynamic_codes(DEVICE)
        blockwise._dynamic_levels(DEVICE)
    for iterations in (2, 4):
        device.waits.clear()
        passes.clear()
        with device:
            found = initialize(
                weight().to(DEVICE), on_triton(name), 8, iterations=iterations, svd="randomized"
            )
        assert isinstance(found.lora_A, There)
        assert len(found.errors) == iterations
        waits.append(len(device.waits))
        passed.append(len(passes))
    assert passed[1] - passed[0] >= 2
    assert waits[1] - waits[0] == passed[1] - passed[0]
    reference = initialize(weight(), FORMATS[name], 8, iterations=4, svd="randomized")
    # Of so few blocks every one that ends elsewhere is seen.
    assert found.errors[0] == pytest.approx(reference.errors[0], rel=1e-3)
    assert found.error == pytest.approx(reference.error, rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_a_gpu_is_waited_for_as_often(name: str, passes: list[int]) -> None:
    """As torch itself counts."""
    W = weight().cuda()
    waits, passed = [], []
    initialize(W, FORMATS[name], 8, iterations=3, svd="randomized")  # compiles
    for iterations in (3, 7):
        passes.clear()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")  # warns of itself
            try:
                initialize(W, FORMATS[name], 8, iterations=iterations, svd="randomized")
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("called a synchronizing" in str(each.message) for each in told))
        passed.append(len(passes))
    assert waits[1] - waits[0] == passed[1] - passed[0]
