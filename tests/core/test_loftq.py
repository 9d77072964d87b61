"""The alternation against a slow textbook version, against PEFT, and against its own claims."""

import math
from typing import Any

import pytest
import torch
from peft_on_cpu import loftq_init, relative_residual
from torch import Tensor

from loftq_cli.core import loftq
from loftq_cli.core.blockwise import SOURCE_DTYPES, BlockwiseFormat, quantize_blockwise
from loftq_cli.core.codebooks import codebook
from loftq_cli.core.loftq import LoftqResult, initialize
from loftq_cli.core.lowrank import truncated_svd
from loftq_cli.core.quantizers import Blockwise, Int8
from loftq_cli.core.steps import Factors, Quantizer
from loftq_cli.errors import InvalidSetting, NonFiniteWeight

NF4 = Blockwise(BlockwiseFormat("nf4", 64))
PLAIN = NF4.plain()


def low_rank_plus_noise(rows: int, columns: int, rank: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, columns, generator=generator) * 0.02
    left = torch.randn(rows, rank, generator=generator)
    return noise + 0.002 * left @ torch.randn(rank, columns, generator=generator)


def textbook_quantize(W: Tensor, quant_type: str, block_size: int) -> Tensor:
    """Every block by itself, in float64: scale, take the nearest level, scale back."""
    levels = codebook(quant_type).level_tensor().double()
    Q = torch.zeros(W.numel(), dtype=torch.float64)
    for start in range(0, W.numel(), block_size):
        block = W.reshape(-1)[start : start + block_size]
        absmax = block.abs().max()
        if absmax > 0:
            nearest = (block[:, None] / absmax - levels).abs().argmin(dim=1)
            Q[start : start + block_size] = levels[nearest] * absmax
    return Q.view(W.shape)


def textbook_loftq(
    W: Tensor, rank: int, iterations: int, quant_type: str, block_size: int
) -> list[float]:
    """Algorithm 1 of arXiv 2310.08659 as it is printed, in float64: the error of every iterate."""
    W = W.double()
    AB = torch.zeros_like(W)
    errors = []
    for _ in range(iterations):
        Q = textbook_quantize(W - AB, quant_type, block_size)
        U, S, Vh = torch.linalg.svd(W - Q, full_matrices=False)
        AB = U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank]
        errors.append(float((W - Q - AB).norm() / W.norm()))
    return errors


def measured(W: Tensor, quantizer: Quantizer, result: LoftqResult, scaling: float = 1.0) -> float:
    """The error as anyone would measure it from the files, all in float64."""
    Q = quantizer.dequantize(result.quantized).double()
    rest = W.double() - Q - scaling * result.lora_B.double() @ result.lora_A.double()
    return float(rest.norm() / W.double().norm())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(96, 128, 8), (130, 70, 16), (64, 32, 1)])
def test_every_iterate_is_the_textbooks(
    rows: int, columns: int, rank: int, quant_type: Any
) -> None:
    W = low_rank_plus_noise(rows, columns, 8)
    quantizer = Blockwise(BlockwiseFormat(quant_type, 32), search=False)
    result = initialize(W, quantizer, rank, iterations=4, svd="exact")
    expected = textbook_loftq(W, rank, 4, quant_type, 32)
    assert result.errors == pytest.approx(expected, rel=1e-3)
    assert result.error == pytest.approx(min(expected), rel=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_residual_is_that_of_peft(bits: int) -> None:
    W = low_rank_plus_noise(512, 512, 32)
    quantizer: Quantizer = PLAIN if bits == 4 else Int8()
    ours = initialize(W, quantizer, 16, iterations=5, svd="exact")
    theirs = relative_residual(W, *loftq_init(W, bits, 16, 5))
    # bitsandbytes squeezes an 8-bit weight through float16 first; we do not, which is no worse.
    assert ours.errors[-1] == pytest.approx(theirs, rel=1e-3 if bits == 4 else 1e-2)
    assert ours.error <= theirs * 1.001


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "columns", "rank"), [(768, 2304, 16), (2048, 2048, 64)])
def test_residual_is_that_of_peft_at_full_size(rows: int, columns: int, rank: int) -> None:
    W = low_rank_plus_noise(rows, columns, 2 * rank)
    ours = initialize(W, PLAIN, rank, iterations=5, svd="exact")
    theirs = relative_residual(W, *loftq_init(W, 4, rank, 5))
    assert ours.errors[-1] == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("dtype", SOURCE_DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_reported_errors_are_those_measured_from_what_is_stored(
    dtype: torch.dtype, double_quant: bool
) -> None:
    W = low_rank_plus_noise(128, 192, 8).to(dtype)
    quantizer = Blockwise(BlockwiseFormat("nf4", 64, double_quant))
    result = initialize(W, quantizer, 8, iterations=3, scaling=2.0)
    assert quantizer.dequantize(result.quantized).dtype == dtype
    assert result.error == pytest.approx(measured(W, quantizer, result, 2.0), rel=1e-6)
    assert result.errors[result.best_iteration - 1] == result.error
    plain = quantizer.plain().steps(W).quantize()[0]
    plain_error = (W.double() - quantizer.dequantize(plain).double()).norm() / W.double().norm()
    assert result.quantized_only_error == pytest.approx(float(plain_error), rel=1e-6)
    assert result.error < result.quantized_only_error
    assert result.lora_A.dtype == result.lora_B.dtype == torch.float32


def test_what_the_last_svd_takes_away() -> None:
    """‖W − Q − s·B·A‖² = ‖W − Q‖² − Σσᵢ²."""
    W = low_rank_plus_noise(96, 160, 8)
    result = initialize(W, NF4, 12, iterations=3, svd="exact", scaling=0.5)
    Q = NF4.dequantize(result.quantized)
    sigma = torch.linalg.svdvals((W - Q).double())[:12]
    left = float((W - Q).double().square().sum() - sigma.square().sum())
    assert result.error**2 * float(W.double().square().sum()) == pytest.approx(left, rel=1e-5)


def test_any_alpha_gives_the_same_start() -> None:
    W = low_rank_plus_noise(192, 128, 8)
    scalings = [alpha / 16 for alpha in (8, 16, 32, 128)]
    scalings += [alpha / math.sqrt(16) for alpha in (16, 32)]
    results = [initialize(W, NF4, 16, scaling=s, iterations=3) for s in scalings]
    for scaling, result in zip(scalings, results, strict=True):
        assert measured(W, NF4, result, scaling) == pytest.approx(results[1].error, rel=1e-6)
        assert torch.equal(result.quantized.packed, results[1].quantized.packed)


def test_the_best_iterate_is_kept() -> None:
    torch.manual_seed(3)
    W = torch.randn(32, 64)
    result = initialize(W, PLAIN, 8, iterations=8, svd="exact")
    assert len(result.errors) == 8
    assert result.errors[-1] > 1.005 * min(result.errors)
    assert result.best_iteration == 1 + result.errors.index(min(result.errors)) < 8
    assert measured(W, PLAIN, result) == pytest.approx(min(result.errors), rel=1e-6)
    shorter = initialize(W, PLAIN, 8, iterations=result.best_iteration, svd="exact")
    assert torch.equal(shorter.quantized.packed, result.quantized.packed)
    assert torch.equal(shorter.lora_A, result.lora_A)


def test_no_iterations_is_plain_quantization_and_a_fresh_adapter() -> None:
    W = torch.randn(64, 128)
    result = initialize(W, PLAIN, 4, iterations=0, seed=7)
    assert torch.equal(result.quantized.packed, quantize_blockwise(W, PLAIN.format).packed)
    assert (result.lora_B == 0).all()
    assert result.lora_B.shape == (64, 4)
    assert 0.8 / math.sqrt(128) < result.lora_A.abs().max() <= 1 / math.sqrt(128)
    assert result.best_iteration == 0
    assert result.errors == []
    assert result.error == result.quantized_only_error
    assert torch.equal(result.lora_A, initialize(W, PLAIN, 4, iterations=0, seed=7).lora_A)
    assert not torch.equal(result.lora_A, initialize(W, PLAIN, 4, iterations=0, seed=8).lora_A)
    searched = initialize(W, NF4, 4, iterations=0, seed=7)
    assert searched.error < 0.95 * result.error == 0.95 * searched.quantized_only_error
    assert measured(W, NF4, searched) == pytest.approx(searched.error, rel=1e-6)


@pytest.mark.parametrize("quantizer", [NF4, Blockwise(BlockwiseFormat("fp4", 32, True)), Int8()])
@pytest.mark.parametrize("shape", [(16, 48), (300, 320)])
def test_a_weight_of_zeros(quantizer: Quantizer, shape: tuple[int, int]) -> None:
    result = initialize(torch.zeros(shape), quantizer, 4, iterations=2)
    assert (quantizer.dequantize(result.quantized) == 0).all()
    assert result.error == result.quantized_only_error == 0
    assert set(result.errors) == {0.0}
    assert (result.lora_B @ result.lora_A == 0).all()
    assert (result.lora_A != 0).any()  # or nothing could ever be learnt


@pytest.mark.parametrize("shape", [(1, 100), (100, 1), (1, 1), (33, 65), (7, 64), (200, 3)])
@pytest.mark.parametrize("quantizer", [NF4, Blockwise(BlockwiseFormat("nf4", 4096, True)), Int8()])
def test_awkward_shapes_at_full_rank(shape: tuple[int, int], quantizer: Quantizer) -> None:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    result = initialize(W, quantizer, min(shape), iterations=2)
    assert result.lora_A.shape == (min(shape), shape[1])
    assert result.lora_B.shape == (shape[0], min(shape))
    assert measured(W, quantizer, result) == pytest.approx(result.error, abs=1e-7)
    assert result.error < 1e-6  # a full-rank correction is exact


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_extreme_magnitudes(scale: float) -> None:
    W = low_rank_plus_noise(64, 64, 4)
    usual = initialize(W, NF4, 4, iterations=3)
    assert initialize(W * scale, NF4, 4, iterations=3).error == pytest.approx(usual.error, rel=1e-3)


@pytest.mark.parametrize("svd", ["exact", "auto"])
@pytest.mark.parametrize("scale", [1e-37, 1e-39, 1e-41, 1e-44])
@pytest.mark.parametrize("shape", [(128, 96), (280, 260)])
def test_subnormal_weights_are_no_accident(shape: tuple[int, int], scale: float, svd: str) -> None:
    W = low_rank_plus_noise(*shape, 4) * 50 * scale
    result = initialize(W, NF4, 4, iterations=3, svd=svd)
    assert math.isfinite(result.error)
    assert result.error <= result.quantized_only_error * 1.001
    assert result.lora_A.isfinite().all()
    assert result.lora_B.isfinite().all()


def test_outliers_beyond_half_precision_fall_back_to_a_finite_iterate() -> None:
    W = torch.randn(32, 64) * 100
    W[3, 5] = 65504
    result = initialize(W.half(), Blockwise(BlockwiseFormat("nf4", 64)), 4, iterations=5)
    assert math.isfinite(result.error)
    assert result.error <= result.quantized_only_error


def test_values_beyond_the_runtimes_dtype_are_refused() -> None:
    with pytest.raises(NonFiniteWeight, match="overflow the dtype of the runtime"):
        initialize(torch.full((4, 64), 1e5), Blockwise(NF4.format, torch.float16), 2)


def test_errors_name_what_is_wrong() -> None:
    W = torch.randn(8, 12)
    with pytest.raises(InvalidSetting, match="rank 9 is too large for a 8×12 weight: at most 8"):
        initialize(W, NF4, 9)
    with pytest.raises(InvalidSetting, match="-1 iterations"):
        initialize(W, NF4, 4, iterations=-1)
    with pytest.raises(InvalidSetting, match="scaling of 0"):
        initialize(W, NF4, 4, scaling=0.0)
    W[2, 7] = math.nan
    with pytest.raises(NonFiniteWeight, match=r"1 of 96 .* row 2, column 7"):
        initialize(W, NF4, 4)
    with pytest.raises(NonFiniteWeight) as caught:
        initialize(W, NF4, 4)
    assert str(caught.value.within("h.0.attn")).startswith("h.0.attn: 1 of 96 values")


def test_the_same_seed_gives_the_same_bits() -> None:
    W = low_rank_plus_noise(160, 96, 8)
    first, second = (initialize(W, NF4, 8, iterations=3, seed=5) for _ in range(2))
    assert torch.equal(first.quantized.packed, second.quantized.packed)
    assert torch.equal(first.quantized.absmax, second.quantized.absmax)
    assert torch.equal(first.lora_A, second.lora_A)
    assert torch.equal(first.lora_B, second.lora_B)
    assert first.errors == second.errors


def test_the_weight_is_left_as_it_was() -> None:
    W = torch.randn(32, 64)
    before = W.clone()
    initialize(W, NF4, 4, iterations=2)
    initialize(W, Int8(), 4, iterations=2)
    assert torch.equal(W, before)


def test_a_step_leaves_what_the_low_rank_and_the_codes_do_not_carry() -> None:
    W = torch.randn(48, 64).bfloat16()
    for quantizer in (NF4, Int8()):
        steps = quantizer.steps(W)
        low_rank = truncated_svd(steps.quantize()[1], 4, method="exact")
        carried = Factors(low_rank.U * low_rank.S, low_rank.Vh)
        quantized, residual = steps.quantize(carried)
        assert residual.matrix.dtype == torch.float32
        Q = quantizer.dequantize(quantized).float()
        assert torch.equal(residual.matrix, W.float() - Q)
        assert residual.energy == pytest.approx(float(residual.matrix.double().square().sum()))
        rest = residual.matrix.double() - carried.left.double() @ carried.right.double()
        remainder = steps.remainder(quantized, carried)
        assert remainder == pytest.approx(float(rest.square().sum()), rel=1e-6)
        assert (W.float() - low_rank.dense() - Q).norm() < 0.1 * W.float().norm()


class RoundedToOneDigit(Quantizer):
    """What someone has to write who adds a way of storing weights."""

    def quantize(self, target: Tensor, dtype: torch.dtype, like: Any = None) -> Tensor:
        return (10 * target.float()).round()

    def dequantize(self, quantized: Tensor) -> Tensor:
        return quantized / 10


def test_two_methods_make_a_quantizer() -> None:
    W, quantizer = torch.randn(96, 64), RoundedToOneDigit()
    result = initialize(W, quantizer, 8, iterations=3)
    assert result.error == pytest.approx(measured(W, quantizer, result), rel=1e-6)
    assert result.error < result.quantized_only_error


@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(256, 256, 8), (384, 512, 16), (300, 420, 64), (512, 192, 32)]
)
@pytest.mark.parametrize("rank_of_signal", [0, 24])
def test_the_fast_way_leaves_no_more_than_peft(
    rows: int, columns: int, rank: int, rank_of_signal: int
) -> None:
    W = low_rank_plus_noise(rows, columns, rank_of_signal)
    plain = initialize(W, PLAIN, rank, iterations=5, svd="exact")
    for svd in ("auto", "randomized"):
        fast = initialize(W, PLAIN, rank, iterations=5, svd=svd)
        assert fast.error <= plain.error
        assert fast.error == pytest.approx(measured(W, PLAIN, fast), rel=1e-6)
    once = initialize(W, PLAIN, rank, iterations=1, svd="randomized")
    assert once.error <= plain.errors[0] * 1.003


def test_the_fast_way_does_without_kernels() -> None:
    W = low_rank_plus_noise(300, 260, 8)
    compiled = initialize(W, NF4, 8, iterations=3, svd="randomized")
    readable = initialize(
        W, Blockwise(NF4.format, readable=True), 8, iterations=3, svd="randomized"
    )
    assert readable.errors == pytest.approx(compiled.errors, rel=1e-3)
    one, other = (q.steps(W).quantize()[0] for q in (NF4, Blockwise(NF4.format, readable=True)))
    assert torch.equal(one.packed, other.packed)


@pytest.mark.slow
def test_the_fast_way_leaves_no_more_than_peft_at_full_size() -> None:
    for rows, columns, rank in [(768, 2304, 16), (2048, 2048, 64)]:
        for signal in (0, 2 * rank):
            W = low_rank_plus_noise(rows, columns, signal)
            theirs = relative_residual(W, *loftq_init(W, 4, rank, 5))
            assert initialize(W, NF4, rank, iterations=5).error <= theirs


@pytest.mark.parametrize("quantizer", [NF4, Blockwise(BlockwiseFormat("fp4", 128)), Int8()])
@pytest.mark.parametrize("dtype", SOURCE_DTYPES)
def test_the_number_of_threads_changes_no_bit(quantizer: Quantizer, dtype: torch.dtype) -> None:
    W = low_rank_plus_noise(400, 320, 8).to(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(initialize(W, quantizer, 16, iterations=3, svd="randomized"))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0].lora_A, other.lora_A)
        assert torch.equal(results[0].lora_B, other.lora_B)
        assert results[0].errors == other.errors
        name = "codes" if isinstance(quantizer, Int8) else "packed"
        assert torch.equal(getattr(results[0].quantized, name), getattr(other.quantized, name))


def test_rounded_products_change_the_error_by_nothing_that_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from loftq_cli.core import compiled_step

    W = low_rank_plus_noise(512, 384, 16)
    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(compiled_step, "product_dtype", lambda dtype=dtype: dtype)
        result = initialize(W, NF4, 16, iterations=5, svd="randomized")
        assert result.error == pytest.approx(measured(W, NF4, result), rel=1e-6)
        errors.append(result.error)
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_a_weight_of_low_rank_is_carried_exactly() -> None:
    """The correction takes nearly everything; nothing may be lost to bfloat16 on the way."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(400, 8, generator=generator)
    W = left @ torch.randn(8, 320, generator=generator)
    plain = initialize(W, NF4, 16, iterations=5, svd="exact")
    fast = initialize(W, NF4, 16, iterations=5, svd="randomized")
    assert fast.error <= plain.error * 1.02
    assert measured(W, NF4, fast) == pytest.approx(fast.error, rel=1e-4)


def test_longer_steps_are_given_up_when_the_error_rises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loftq, "MOMENTUM", (3.0, 0.0))
    W = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    wild = initialize(W, NF4, 8, iterations=6, svd="randomized")
    assert wild.error == min(wild.errors)
    assert wild.errors[-1] < 2 * wild.error
    # Where the rank is most of the matrix, they are not tried.
    auto = initialize(W, NF4, 40, iterations=3, svd="auto")
    plain = initialize(W, NF4, 40, iterations=3, svd="exact")
    assert auto.error == pytest.approx(plain.error, rel=1e-5)
