"""The CUDA kernels against the readable reference.

Without a GPU Triton's interpreter runs them on CPU tensors, operation by operation; with one
(`-m gpu`) the very same comparisons are made there.
"""

# ruff: noqa: E402

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if "triton" not in sys.modules and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
triton = pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from loftq_cli.checks import kernels as checks
from loftq_cli.core import columns, cuda_columns, gptq, triton_kernels
from loftq_cli.core.absmax import COLD, search_absmax
from loftq_cli.core.blockwise import SOURCE_DTYPES, BlockwiseFormat
from loftq_cli.core.codebooks import codebook
from loftq_cli.core.cuda_step import Launches, TritonSteps
from loftq_cli.core.extrapolation import Extrapolation
from loftq_cli.core.gptq import Grid, Rounding
from loftq_cli.core.input_moments import DampedMoments, output_energy
from loftq_cli.core.integers import IntegerFormat
from loftq_cli.core.layouts import layout
from loftq_cli.core.loftq import MONOTONE_MOMENTUM, initialize
from loftq_cli.core.quantizers import BlocksQuantizer, Blockwise, Integers
from loftq_cli.core.steps import Factors, ReferenceSteps, Steps

INTERPRETED = not isinstance(triton_kernels.step, triton.JITFunction)
# What the interpreter computes with says so where a block of zeros is divided.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

QUANTIZERS = [
    Blockwise(BlockwiseFormat("nf4", 64)),
    Blockwise(BlockwiseFormat("nf4", 256, double_quant=True)),
    Blockwise(BlockwiseFormat("fp4", 32)),
    Blockwise(BlockwiseFormat("fp4", 4096, double_quant=True)),
    Blockwise(BlockwiseFormat("nf4", 128, bits=3)),
    Blockwise(BlockwiseFormat("nf4", 32, bits=2)),
    *(Integers(IntegerFormat(bits, size)) for bits, size in ((2, 32), (3, 64), (4, 128), (8, 32))),
    Integers(IntegerFormat(4)),
]


def named(quantizer: BlocksQuantizer) -> str:
    return "-".join(map(str, vars(quantizer.format).values()))


every_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=named)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("triton was imported to compile: run this file alone, without a GPU")
    return request.param


def edge_cases(quantizer: BlocksQuantizer, dtype: torch.dtype) -> Tensor:
    """A weight with every kind of block that is not like the others, and for bitsandbytes rows
    that end within blocks, the last of them ragged and of an odd number of values."""
    shape = (3, 1447) if isinstance(quantizer, Blockwise) else (11, 384)
    W = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    flat = W.view(-1)
    flat[:384] = 0.0
    flat[384:768] *= 1e-39 if dtype != torch.float16 else 1e-5  # subnormal, or too small to store
    flat[768 + 5] = -3e4  # beside it nothing is left of the others
    flat[1152:1536] = torch.linspace(-1, 1, 384)
    flat[1536:1920] = -flat[1536:1920].abs()
    flat[1920:2304] = flat[1920:2304].sign()
    if isinstance(quantizer, Integers):
        # A scale that would be another one if it were rounded to bfloat16 on its way to float16.
        flat[2304:2688] = flat[2304:2688].sign() * 8.51 * 2.0**-24 / quantizer.levels.plain_share
    else:
        # In the ragged block, which is divided: ties that a reciprocal would decide otherwise.
        borders = quantizer.levels.midpoints()
        flat[-len(borders) - 5 :] = 0.7
        flat[-len(borders) :] = borders * 0.7
    return W.to(dtype)


def carried_of(W: Tensor) -> Factors:
    generator = torch.Generator().manual_seed(1)
    left = 0.1 * torch.randn(W.shape[0], 4, generator=generator)
    return Factors(left, 0.1 * torch.randn(4, W.shape[1], generator=generator))


def to(factors: Factors, device: str) -> Factors:
    return Factors(factors.left.to(device), factors.right.to(device))


def steps_of(W: Tensor, quantizer: BlocksQuantizer) -> tuple[TritonSteps, ReferenceSteps]:
    ours = TritonSteps(W, quantizer.format, W.dtype, search=quantizer.search)
    return ours, ReferenceSteps(W, quantizer)


def codes_of(stored: Any) -> Tensor:
    return stored.packed if hasattr(stored, "packed") else stored.codes


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(ours.view(-1).view(torch.int32), theirs.view(-1).view(torch.int32))


@every_quantizer
@pytest.mark.parametrize("dtype", SOURCE_DTYPES, ids=str)
def test_codes_and_scales_of_the_formats_own_rule(
    quantizer: BlocksQuantizer, dtype: torch.dtype, device: str
) -> None:
    W = edge_cases(quantizer, dtype).to(device)
    ours, reference = steps_of(W, quantizer.plain())
    (stored, residual), (expected, rest) = ours.quantize(), reference.quantize()
    assert torch.equal(codes_of(stored), codes_of(expected))
    for part, scales in vars(expected).items():
        if isinstance(scales, Tensor):
            assert torch.equal(getattr(stored, part).view(scales.shape), scales), part
    assert torch.equal(residual.matrix, rest.matrix)
    assert residual.energy == pytest.approx(rest.energy, rel=1e-12)
    carried = to(carried_of(W), device)
    remainder = reference.remainder(expected, carried)
    assert ours.remainder(stored, carried) == pytest.approx(remainder, rel=1e-6)


@every_quantizer
def test_with_given_scales_the_codes_of_the_reference(
    quantizer: BlocksQuantizer, device: str
) -> None:
    """Of a target that a low rank was taken off, and with scales of either sign."""
    W = edge_cases(quantizer, torch.bfloat16)
    W.view(-1)[768 + 5] = -0.3  # -3e4 would be all that double quantization sees
    W, carried = W.to(device), to(carried_of(W), device)
    product = carried.left @ carried.right
    expected = quantizer.quantize(W.float() - product, W.dtype)
    form = layout(quantizer.format, (W.shape[0], W.shape[1]), W.dtype)
    codes, scales = form.parts(expected)
    # FP4's levels are the same on both sides.
    assert (scales < 0).any() or quantizer.levels == codebook("fp4")
    ours, rest = torch.empty_like(codes), torch.empty_like(product)
    energy = Launches(W, form).step(product, None, scales.clone(), ours, rest, given=True)
    assert torch.equal(ours, codes)
    left = W.float() - quantizer.dequantize(expected).float()
    assert torch.equal(rest, left)
    assert float(energy) == pytest.approx(float(left.double().square().sum()), rel=1e-12)


@every_quantizer
def test_a_search_ends_where_that_of_the_reference_does(
    quantizer: BlocksQuantizer, device: str
) -> None:
    """Around the scales of a similar weight, as far as sums are the same."""
    W = edge_cases(quantizer, torch.bfloat16)
    # Beside -3e4 the squares of all other blocks would not be seen.
    W.view(-1)[768 + 5] = -0.3
    W, carried = W.to(device), to(carried_of(W), device)
    ours, reference = steps_of(W, quantizer)
    like = reference.quantize()[0]
    stored, residual = ours.quantize(carried, like)
    expected, rest = reference.quantize(carried, like)
    # What eight bits leave is hardly more than float32 tells apart in the sums.
    noise = 2e-8 * float(W.double().square().sum())
    assert residual.energy == pytest.approx(rest.energy, rel=1e-5, abs=noise)
    (_, scales), (_, theirs) = ours.layout.parts(stored), ours.layout.parts(expected)
    near = (scales - theirs).abs() <= 1e-5 * theirs.abs() + 1e-7 * theirs.abs().max()
    # Where sums decide between two ends, or between two codes of double quantization.
    assert near.float().mean() > 0.98
    assert torch.equal(residual.matrix, W.float() - quantizer.dequantize(stored).float())


@pytest.mark.parametrize("quantizer", [*QUANTIZERS[:2], Integers(IntegerFormat(4, 64))], ids=named)
@pytest.mark.parametrize("plain", [False, True])
def test_what_is_aimed_at_beyond_the_low_rank_is_that_of_the_reference(
    quantizer: BlocksQuantizer, plain: bool, device: str
) -> None:
    """Of one step after the other, the third without the extra length, and what is remembered."""
    W = edge_cases(quantizer, torch.bfloat16)
    W.view(-1)[768 + 5] = -0.3
    W, low_rank = W.to(device), to(carried_of(W), device)
    ours, reference = steps_of(W, quantizer.plain() if plain else quantizer)
    ahead, theirs = (Extrapolation(W, *MONOTONE_MOMENTUM) for _ in range(2))
    like = reference.quantize()[0]
    for size, restarts in ((1.0, False), (0.9, False), (1.1, True), (1.0, False)):
        carried = Factors(size * low_rank.left, low_rank.right)
        ahead.restarts = theirs.restarts = restarts
        stored, residual = ours.quantize(carried, like, ahead)
        expected, rest = reference.quantize(carried, like, theirs)
        assert residual.energy == pytest.approx(rest.energy, rel=1e-5)
        same = codes_of(stored) == codes_of(expected)
        assert same.float().mean() > 0.99
        torch.testing.assert_close(ahead.memory, theirs.memory, rtol=1e-5, atol=1e-7)
        like = expected


@pytest.mark.parametrize("quantizer", [QUANTIZERS[0], Integers(IntegerFormat(4, 64))], ids=named)
def test_a_search_takes_the_starts_it_is_given(quantizer: BlocksQuantizer, device: str) -> None:
    """And these from nothing; of their number and passes nothing is compiled in."""
    W = edge_cases(quantizer, torch.float32)[:3].contiguous().to(device)
    form = layout(quantizer.format, (W.shape[0], W.shape[1]), W.dtype)
    blocks = torch.nn.functional.pad(W.view(-1), (0, -W.numel() % 64)).view(-1, 64)
    for starts in (COLD, replace(COLD, passes=1), replace(COLD, factors=(0.9, -0.7))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("loftq_cli.core.absmax.starts_for", lambda *_, **__: starts)  # noqa: B023
            expected = search_absmax(blocks, None, form.levels, form.largest)
        scales = torch.empty_like(expected)
        Launches(W, form).step(None, None, scales, None, None, starts)
        torch.testing.assert_close(scales, expected, rtol=1e-5, atol=0.0)


def test_a_weight_whose_squares_float32_does_not_hold(device: str) -> None:
    W = torch.full((4, 64), 1e30, device=device)
    W[:, ::2] = 0.3e30
    ours, reference = steps_of(W, QUANTIZERS[0].plain())
    energy = ours.quantize()[1].energy
    assert energy == pytest.approx(reference.quantize()[1].energy)
    assert energy > 1e50


def test_a_ragged_block_of_zeros_has_the_absmax_that_it_is_divided_by(device: str) -> None:
    ours, reference = steps_of(torch.zeros(1, 70, device=device), QUANTIZERS[0].plain())
    absmax = ours.quantize()[0].absmax
    assert absmax.tolist() == reference.quantize()[0].absmax.tolist()
    assert absmax[0] == 0 < absmax[1]


def test_a_weight_in_another_order_of_memory(device: str) -> None:
    W = edge_cases(QUANTIZERS[0], torch.bfloat16).to(device)
    turned = W.t().contiguous().t()
    ours, reference = (steps_of(each, QUANTIZERS[0].plain())[0] for each in (turned, W))
    assert torch.equal(ours.quantize()[0].packed, reference.quantize()[0].packed)


class OnTriton(Blockwise):
    def steps(self, W: Tensor, *, rounded: bool = False) -> Steps:
        return TritonSteps(W, self.format, self.dtype or W.dtype, search=self.search)


def test_the_alternation_ends_where_the_reference_does(device: str) -> None:
    W = 0.02 * torch.randn(32, 128, generator=torch.Generator().manual_seed(2)).to(device)
    fmt = BlockwiseFormat("nf4", 64, double_quant=True)
    ours, reference = (
        initialize(W, quantizer, 4, iterations=2, svd="randomized")
        for quantizer in (OnTriton(fmt), Blockwise(fmt, readable=True))
    )
    assert ours.errors == pytest.approx(reference.errors, rel=1e-4)
    assert ours.quantized_only_error == pytest.approx(reference.quantized_only_error, rel=1e-6)
    assert ours.backbone_error == pytest.approx(reference.backbone_error, rel=1e-4)


@pytest.mark.gpu
def test_cuda_weights_get_the_kernels() -> None:
    W = torch.randn(64, 256).cuda()
    assert isinstance(QUANTIZERS[0].steps(W), TritonSteps)
    assert isinstance(replace(QUANTIZERS[0], readable=True).steps(W), ReferenceSteps)


@pytest.mark.gpu
def test_check_compares_the_kernels_with_the_reference() -> None:
    assert checks.compiled("cuda").figures["formats"] > 20


@pytest.mark.gpu
@pytest.mark.parametrize("quantizer", [QUANTIZERS[1], Integers(IntegerFormat(4, 64))], ids=named)
def test_the_gpu_ends_where_the_cpu_does(quantizer: BlocksQuantizer) -> None:
    W = 0.02 * torch.randn(768, 1024, generator=torch.Generator().manual_seed(4))
    there, here = (initialize(weight, quantizer, 16) for weight in (W.cuda(), W))
    assert there.error == pytest.approx(here.error, rel=2e-3)


def test_the_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """To machine code, and to none that rounds in another way than the reference."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.core.compile_kernels"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(" kernels\n")


CALIBRATED = [
    Blockwise(BlockwiseFormat("nf4", 32, bits=3)),
    Blockwise(BlockwiseFormat("nf4", 256, bits=2)),  # blocks reach over the ends of rows
    Integers(IntegerFormat(3, 32)),
    Integers(IntegerFormat(8)),
]


@pytest.mark.parametrize("quantizer", CALIBRATED, ids=named)
def test_error_feedback_and_descent_end_where_the_reference_does(
    quantizer: BlocksQuantizer, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(512, 96, generator=generator)
    inputs[:, 1:] += 0.7 * inputs[:, :-1]
    T = 0.02 * torch.randn(21, 96, generator=generator)
    T[3, :32], T[4] = 0.0, 1e-35
    T = T.to(device)
    moments = DampedMoments.of((inputs.t() @ inputs / 512).to(device))
    size, largest = quantizer.block_size(96), quantizer.largest(torch.bfloat16)
    grid = Grid.of(quantizer.levels, size, T, largest, 2.0**-3)
    given = None if grid.aligned else torch.full((-(-T.numel() // size),), 0.05, device=device)

    def run() -> list[tuple[Rounding, float]]:
        passed_on = gptq.gptq(T, moments.root, grid, given)
        descended = gptq.descend(T, moments.moments, passed_on, grid, sweeps=1, free=True)
        return [(rounding, error(rounding)) for rounding in (passed_on, descended)]

    def error(rounding: Rounding) -> float:
        scales = grid.scales(rounding.absmax, slice(0, 21), slice(0, 96)).t()
        R = T - grid.levels[rounding.indices.int()] * scales
        return output_energy(R, moments.moments)

    monkeypatch.setattr(gptq, "column_loops", lambda *_: columns)
    reference = run()
    monkeypatch.setattr(gptq, "column_loops", lambda *_: cuda_columns)
    for (ours, left), (theirs, least) in zip(run(), reference, strict=True):
        # A code that rounding took elsewhere takes its row with it, to an end as good as the other.
        same = (ours.indices == theirs.indices).all(dim=1)
        assert same.float().mean() > 0.8
        assert left == pytest.approx(least, rel=2e-3)
        if grid.aligned:
            near = torch.isclose(ours.absmax, theirs.absmax, rtol=1e-5, atol=1e-9)
            assert near.view(21, -1)[same].float().mean() > 0.95


@pytest.mark.parametrize("quantizer", CALIBRATED[1:3], ids=named)
def test_columns_on_the_border_between_two_levels(quantizer: BlocksQuantizer, device: str) -> None:
    """They take the lower one, among integers too, and below the lowest level that one."""
    outside = -quantizer.levels.outermost - 0.5
    borders = torch.cat((torch.tensor([outside]), quantizer.levels.midpoints())).to(device)
    target = torch.stack((borders, borders - 1e-4, borders + 1e-4))
    grid = Grid.of(quantizer.levels, 32, target, 1e30)
    codes = torch.zeros(target.shape, dtype=torch.uint8, device=device)
    U, scales = torch.eye(3, device=device), torch.ones_like(target)
    cuda_columns.pass_on(target, scales, U, grid, codes)
    assert torch.equal(codes, grid.nearest(target).to(torch.uint8))
