"""Calibrated starts against slow float64 textbook versions, and against their own claims."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from test_integers import FORMATS, assert_storable
from torch import Tensor

from loftq_cli.core.blockwise import (
    SOURCE_DTYPES,
    BlockwiseFormat,
    QuantizedBlockwise,
    restore_absmax,
)
from loftq_cli.core.calibrated import initialize_calibrated
from loftq_cli.core.codebooks import LARGEST_SCALE, codebook
from loftq_cli.core.gptq import Grid, Rounding, descend, gptq
from loftq_cli.core.input_moments import DampedMoments, principal_root, weighted_low_rank
from loftq_cli.core.integers import IntegerFormat, QuantizedIntegers
from loftq_cli.core.loftq import LoftqResult, initialize
from loftq_cli.core.quantizers import BlocksQuantizer, Blockwise, Int8, Integers
from loftq_cli.errors import InvalidSetting, LoftqError, NonFiniteWeight

FORMAT = BlockwiseFormat("nf4", 64)
NF4 = Blockwise(FORMAT)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def correlated_inputs(samples: int, features: int, seed: int = 0) -> Tensor:
    """Tokens (samples × features): a few strong directions, and channels of different sizes."""
    mixing = normal(features // 4, features, seed=seed + 1)
    X = normal(samples, features // 4, seed=seed) @ mixing
    return (X + normal(samples, features, seed=seed + 2)) * normal(features, seed=seed + 3).exp()


def moments_of(X: Tensor) -> Tensor:
    return (X.double().t() @ X.double() / len(X)).float()


def objective(R: Tensor, G: Tensor) -> float:
    """tr(R·G·Rᵀ) in float64."""
    return float(((R.double() @ G.double()) * R.double()).sum())


def grid_of(W: Tensor, fmt: BlockwiseFormat | IntegerFormat) -> Grid:
    if isinstance(fmt, IntegerFormat):
        return Grid.of(fmt.grid, fmt.size(W.shape[1]), W, LARGEST_SCALE)
    return Grid.of(codebook(fmt.quant_type, fmt.bits), fmt.block_size, W, 1e30)


def values(rounding: Rounding, grid: Grid) -> Tensor:
    scales = rounding.absmax.repeat_interleave(grid.block_size)[: rounding.indices.numel()]
    return grid.levels[rounding.indices.int()] * scales.view(rounding.indices.shape)


def textbook_gptq(T: Tensor, G: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """GPTQ as its paper tells it: round a column, update the rest, forget the column."""
    T, scales, levels = T.double().clone(), scales.double(), levels.double()
    inverse = torch.linalg.inv(G.double())
    Q = torch.zeros_like(T)
    for j in range(T.shape[1]):
        ideal = (T[:, j] / scales[:, j])[:, None]
        Q[:, j] = levels[(ideal - levels).abs().argmin(dim=1)] * scales[:, j]
        error = (T[:, j] - Q[:, j]) / inverse[j, j]
        T -= error[:, None] * inverse[j][None]
        inverse -= inverse[:, j : j + 1] * inverse[j : j + 1] / inverse[j, j]
    return Q


@pytest.mark.parametrize(
    ("rows", "columns", "fmt"),
    [
        (40, 128, BlockwiseFormat("nf4", 32)),
        (24, 256, BlockwiseFormat("nf4", 128)),
        (33, 100, BlockwiseFormat("fp4", 32)),  # blocks reach over the ends of rows
        (40, 64, BlockwiseFormat("nf4", 64, bits=2)),
        (40, 128, IntegerFormat(4, 32)),
        (24, 192, IntegerFormat(2)),
        (24, 128, IntegerFormat(8, 64)),
    ],
)
def test_gptq_is_the_textbooks(
    rows: int, columns: int, fmt: BlockwiseFormat | IntegerFormat
) -> None:
    T, G = normal(rows, columns), moments_of(correlated_inputs(1000, columns))
    inputs, grid = DampedMoments.of(G), grid_of(T, fmt)
    absmax = None if grid.aligned else torch.rand(-(-T.numel() // 32), generator=seeded()) + 1
    rounding = gptq(T, inputs.root, grid, absmax)
    assert torch.equal(grid.possible(rounding.absmax), rounding.absmax)
    scales = rounding.absmax.repeat_interleave(grid.block_size)[: T.numel()].view(T.shape)
    expected = textbook_gptq(T, inputs.moments, scales, grid.levels)
    # A tie that float32 decides the other way changes all of a row that comes after it.
    same = (values(rounding, grid).double() - expected).abs().amax(dim=1) < 1e-5
    assert same.float().mean() > 0.9
    ours, theirs = (objective(T - Q, inputs.moments) for Q in (values(rounding, grid), expected))
    assert ours == pytest.approx(theirs, rel=2e-3)


def test_gptq_in_pieces_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """No row's result depends on which others are worked on with it."""
    T, inputs = normal(150, 128), DampedMoments.of(moments_of(correlated_inputs(500, 128)))
    grid = grid_of(T, FORMAT)
    once = gptq(T, inputs.root, grid)
    once = descend(T, inputs.moments, once, grid, sweeps=1, free=True)
    monkeypatch.setattr("loftq_cli.core.gptq._PAYS", 64)
    pieces = gptq(T, inputs.root, grid)
    pieces = descend(T, inputs.moments, pieces, grid, sweeps=1, free=True)
    assert (once.indices == pieces.indices).float().mean() > 0.999
    assert torch.allclose(once.absmax, pieces.absmax, rtol=1e-3)


@pytest.mark.parametrize(
    "fmt",
    [
        *(BlockwiseFormat("nf4", 64, bits=bits) for bits in (4, 3, 2)),
        *(IntegerFormat(bits, 64) for bits in (4, 3, 2)),
    ],
    ids=str,
)
def test_absmax_is_nearly_the_best_of_a_fine_grid(fmt: BlockwiseFormat | IntegerFormat) -> None:
    """With uncorrelated inputs nothing is passed on, and every block is a problem of its own."""
    T, weights = normal(200, 64), torch.rand(64, generator=seeded(1)) + 0.1
    grid = grid_of(T, fmt)
    found = gptq(T, torch.diag(weights.sqrt()), grid)
    cost = ((T - values(found, grid)).square() * weights).sum(dim=1)
    best = torch.full_like(cost, torch.inf)
    for share in torch.linspace(0.2, 1.2, 300):
        absmax = grid.possible(T.abs().amax(dim=1, keepdim=True) * share / -grid.levels[0])
        rest = T - grid.levels[grid.nearest(T / absmax)] * absmax
        best = torch.minimum(best, (rest.square() * weights).sum(dim=1))
    assert cost.sum() < 1.04 * best.sum()


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize(
    ("columns", "fmt"),
    [
        (128, FORMAT),
        (256, BlockwiseFormat("nf4", 256, bits=3)),
        (96, BlockwiseFormat("fp4", 32)),
        (90, BlockwiseFormat("nf4", 64, bits=2)),
        (128, IntegerFormat(2, 32)),
        (90, IntegerFormat(3)),
        (256, IntegerFormat(8, 128)),
    ],
)
def test_descent_never_raises_the_objective(
    columns: int, fmt: BlockwiseFormat | IntegerFormat, free: bool
) -> None:
    T = normal(30, columns) * normal(30, 1, seed=5).exp()
    G = DampedMoments.of(moments_of(correlated_inputs(40, columns))).moments
    grid = grid_of(T, fmt)
    count = -(-T.numel() // grid.block_size)
    absmax = (torch.rand(count, generator=seeded(1)) * 2 + 1e-3) / -grid.levels[0]
    rounding = Rounding(
        torch.randint(0, grid.levels.numel(), T.shape, generator=seeded()).to(torch.uint8),
        grid.possible(absmax),
    )
    before = first = objective(T - values(rounding, grid), G)
    for _ in range(5):
        rounding = descend(T, G, rounding, grid, sweeps=1, free=free)
        after = objective(T - values(rounding, grid), G)
        assert after <= before * (1 + 1e-5)
        assert torch.equal(grid.possible(rounding.absmax), rounding.absmax)
        before = after
    assert after < 0.9 * first


def test_descent_ends_where_no_single_code_and_no_absmax_can_be_bettered() -> None:
    T, G = normal(6, 64), DampedMoments.of(moments_of(correlated_inputs(300, 64))).moments
    grid = grid_of(T, FORMAT)
    start = gptq(T, DampedMoments.of(G).root, grid)
    end = descend(T, G, start, grid, sweeps=60, free=True)
    Q, scales = values(end, grid), end.absmax.view(6, 1)
    least = objective(T - Q, G)
    for row in range(6):
        for column in range(0, 64, 7):
            for level in grid.levels:
                other = Q.clone()
                other[row, column] = level * scales[row, 0]
                assert objective(T - other, G) > least * (1 - 1e-5)
    for factor in (0.999, 1.001):
        assert objective(T - Q * factor, G) > least


@pytest.mark.parametrize("samples", [2000, 30])
def test_qera_is_the_closed_form(samples: int) -> None:
    """Q is the plain quantization, and B·A its best correction; with too few tokens as well."""
    W, G = normal(48, 64), moments_of(correlated_inputs(samples, 64) + normal(samples, 64, seed=9))
    result = initialize_calibrated(W, G, NF4, 6, method="qera")
    Q = NF4.dequantize(result.quantized)
    assert torch.equal(Q, NF4.dequantize(NF4.steps(W).quantize()[0]))
    R = (W - Q).double()
    eigenvalues, P = torch.linalg.eigh(G.double())
    kept = eigenvalues > eigenvalues[-1] * 64 * torch.finfo(torch.float32).eps
    root = P[:, kept] * eigenvalues[kept].sqrt()
    U, S, Vh = torch.linalg.svd(R @ root, full_matrices=False)
    expected = U[:, :6] @ torch.diag(S[:6]) @ Vh[:6] @ (P[:, kept] / eigenvalues[kept].sqrt()).t()
    product = (result.lora_B @ result.lora_A).double()
    # Where there are no inputs the two may differ; what they put out is the same.
    assert torch.allclose(product @ root, expected @ root, atol=2e-5 * float(S[0]))
    assert bool(kept.all()) == (samples > 64)
    if kept.all():
        assert torch.allclose(product, expected, atol=1e-3 * float(expected.abs().max()))
    error = ((R - expected) @ root).norm() / (W.double() @ root).norm()
    assert result.output_error == pytest.approx(float(error), rel=1e-4)


def test_diagonal_qera_is_the_closed_form() -> None:
    W, G = normal(48, 64), moments_of(correlated_inputs(500, 64))
    result = initialize_calibrated(W, G, NF4, 6, method="qera-diagonal")
    D = G.diagonal().double().sqrt()
    R = (W - NF4.dequantize(result.quantized)).double()
    U, S, Vh = torch.linalg.svd(R * D, full_matrices=False)
    expected = U[:, :6] @ torch.diag(S[:6]) @ Vh[:6] / D
    product = (result.lora_B @ result.lora_A).double()
    assert torch.allclose(product, expected, atol=1e-4 * float(expected.abs().max()))


def test_no_matrix_of_the_rank_is_better() -> None:
    R, G = normal(30, 48), moments_of(correlated_inputs(400, 48))
    low_rank = weighted_low_rank(R, principal_root(G), 4, seeded(), tolerance=1e-5)
    least = objective(R - low_rank.dense(), G)
    left, right = low_rank.U * low_rank.S, low_rank.Vh
    for seed in range(40):
        size = 10.0 ** (-seed % 4)
        other = (left + size * normal(30, 4, seed=seed)) @ (
            right + size * normal(4, 48, seed=seed + 1)
        )
        assert objective(R - other, G) >= least * (1 - 1e-6)
    # And from somewhere else, alternating least squares in float64 gets no further.
    B, G64 = normal(30, 4).double(), G.double()
    for _ in range(200):
        A = torch.linalg.lstsq(B, R.double()).solution
        B = torch.linalg.solve(A @ G64 @ A.t(), R.double() @ G64 @ A.t(), left=False)
    assert objective(R - B @ A, G) >= least * (1 - 1e-6)


def test_a_root_is_a_root() -> None:
    G = moments_of(correlated_inputs(300, 70))
    inputs = DampedMoments.of(G)
    damped = G.double() / G.diagonal().double().mean()
    assert torch.allclose(inputs.moments.double(), damped + 0.01 * torch.eye(70), atol=1e-6)
    root = inputs.root.double()
    assert torch.allclose(root @ root.t(), inputs.moments.double(), atol=1e-4)
    assert torch.equal(root, root.triu())


def check_claims(
    W: Tensor, G: Tensor, quantizer: BlocksQuantizer, result: LoftqResult, scaling: float
) -> None:
    """All that a result says of itself, measured anew in float64."""
    Q = quantizer.dequantize(result.quantized)
    assert Q.dtype == (quantizer.dtype or W.dtype)
    BA = scaling * result.lora_B.double() @ result.lora_A.double()
    plain = quantizer.plain()
    for R, error, output_error in (
        (W.double() - Q.double() - BA, result.error, result.output_error),
        (
            W.double() - plain.dequantize(plain.steps(W).quantize()[0]).double(),
            result.quantized_only_error,
            result.quantized_only_output_error,
        ),
    ):
        norm, outputs = float(W.double().norm()) or 1.0, objective(W, G) ** 0.5 or 1.0
        assert error == pytest.approx(float(R.norm()) / norm, rel=1e-3, abs=1e-6)
        expected = max(objective(R, G), 0.0) ** 0.5 / outputs
        assert output_error == pytest.approx(expected, rel=1e-3, abs=3e-4)
    assert result.output_norm == pytest.approx(objective(W, G) ** 0.5, rel=1e-3, abs=1e-30)
    best = result.best_iteration
    assert result.errors[best - 1] == result.output_error
    # Below 1e-5 of W's own it is float32's rounding that is measured.
    assert min(result.errors) >= result.errors[best - 1] * (1 - 1e-3) - 1e-5
    accepted = result.errors[:best]
    assert all(b <= a * (1 + 1e-4) + 1e-5 for a, b in pairwise(accepted))


def rank_one(rows: int, columns: int) -> Tensor:
    return normal(rows, 1) @ normal(1, columns, seed=1)


WEIGHTS = {
    "normal": normal(40, 64),
    "heavy tails": normal(40, 64) ** 3,
    "rank one": rank_one(40, 64),
    "zero": torch.zeros(40, 64),
    "one value": torch.zeros(40, 64).index_put(
        (torch.tensor(3), torch.tensor(50)), torch.tensor(2.0)
    ),
    "huge range": normal(40, 64) * 10.0 ** torch.linspace(-20, 15, 40)[:, None],
    "large": normal(40, 64) * 1e30,
    "small": normal(40, 64) * 1e-30,
    "ragged blocks": normal(40, 70),
    "few inputs": normal(40, 24),
}


def inputs_called(name: str, features: int) -> Tensor:
    X = correlated_inputs(500, features)
    if name == "few tokens":
        X = X[:9]
    if name == "dead inputs":
        X[:, ::3] = 0
    if name == "rank one":
        X = normal(500, 1) @ X[:1]
    if name == "huge range":
        X = X * 10.0 ** torch.linspace(-8, 8, features)
    if name == "zero":
        X = X * 0
    return moments_of(X)


INPUTS = ("correlated", "few tokens", "dead inputs", "rank one", "huge range", "zero")


@pytest.mark.parametrize("quantizer", [NF4, Integers(IntegerFormat(3))], ids=["nf4", "int3"])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_claims_hold_and_errors_never_rise(
    weight: str, inputs: str, quantizer: BlocksQuantizer
) -> None:
    W = WEIGHTS[weight]
    G = inputs_called(inputs, W.shape[1])
    result = initialize_calibrated(W, G, quantizer, 4, scaling=2.0)
    if not G.any():  # then it is the weight's errors that count
        assert result.output_norm == 0.0
        G, result = torch.eye(W.shape[1]), replace(result, output_norm=float(W.double().norm()))
    check_claims(W, G, quantizer, result, 2.0)
    assert result.lora_A.shape == (4, W.shape[1])
    assert result.lora_B.shape == (40, 4)
    assert all(factor.isfinite().all() for factor in (result.lora_A, result.lora_B))


def test_output_error_is_that_of_the_outputs() -> None:
    W, X = normal(48, 64), correlated_inputs(500, 64)
    for method in ("calibrated", "qera", "qera-diagonal"):
        result = initialize_calibrated(W, moments_of(X), NF4, 4, method=method, scaling=0.5)
        rest = W - NF4.dequantize(result.quantized) - 0.5 * result.lora_B @ result.lora_A
        expected = (X @ rest.t()).norm() / (X @ W.t()).norm()
        assert result.output_error == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize(
    "quantizer",
    [
        *(Blockwise(replace(FORMAT, bits=bits)) for bits in (4, 3, 2)),
        *(Integers(IntegerFormat(bits, 64)) for bits in (4, 3, 2)),
    ],
    ids=str,
)
def test_calibrated_beats_qera_beats_loftq(quantizer: BlocksQuantizer) -> None:
    W, X = normal(96, 128), correlated_inputs(2000, 128)
    G = moments_of(X)

    def output_error(result: LoftqResult) -> float:
        rest = W - quantizer.dequantize(result.quantized) - result.lora_B @ result.lora_A
        return float((X @ rest.t()).norm())

    loftq = output_error(initialize(W, quantizer, 8))
    diagonal, qera, calibrated = (
        output_error(initialize_calibrated(W, G, quantizer, 8, method=method))
        for method in ("qera-diagonal", "qera", "calibrated")
    )
    assert calibrated < 0.7 * qera
    assert qera < diagonal
    assert qera < 0.9 * loftq


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    ("quant_type", "bits", "dtype"),
    [
        ("nf4", 4, torch.float32),
        ("nf4", 3, torch.bfloat16),
        ("nf4", 2, torch.float16),
        ("fp4", 4, torch.bfloat16),
    ],
)
def test_codes_are_those_of_so_many_bits_and_bitsandbytes_reads_them(
    quant_type: Any, bits: int, dtype: torch.dtype, double_quant: bool
) -> None:
    W, G = normal(24, 64), moments_of(correlated_inputs(500, 64))
    quantizer = Blockwise(BlockwiseFormat(quant_type, 32, double_quant, bits=bits), dtype)
    result = initialize_calibrated(W, G, quantizer, 4, iterations=2)
    q = result.quantized
    assert isinstance(q, QuantizedBlockwise)
    codes = torch.stack((q.packed >> 4, q.packed & 0xF)).unique().tolist()
    assert set(codes) <= set(codebook(quant_type, bits).order)
    assert torch.equal(quantizer.dequantize(q), read_by_bitsandbytes(q))
    check_claims(W, G, quantizer, result, 1.0)


def read_by_bitsandbytes(q: QuantizedBlockwise) -> Tensor:
    """Its device-independent kernel, which has no shortcuts to go wrong."""
    absmax = q.absmax
    if q.nested_absmax is not None:
        nested = bnb.QuantState(
            absmax=q.nested_absmax,
            code=bnb.create_dynamic_map(),
            blocksize=256,
            dtype=torch.float32,
        )
        absmax = bnb.dequantize_blockwise(q.absmax, nested) + q.nested_offset
    return _dequantize_4bit_compute(
        q.packed.reshape(-1),
        absmax,
        bnb.get_4bit_type(q.format.quant_type, device="cpu"),
        q.format.block_size,
        q.shape,
        q.dtype,
    )


@pytest.mark.parametrize("dtype", SOURCE_DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_integers_can_be_stored_in_either_container(fmt: IntegerFormat, dtype: torch.dtype) -> None:
    """And of blocks of zeros, the codes are zero."""
    W, G = normal(24, 128), moments_of(correlated_inputs(500, 128))
    W[3] = 0
    quantizer = Integers(fmt)
    result = initialize_calibrated(W.to(dtype), G, quantizer, 4, iterations=2)
    q = result.quantized
    assert isinstance(q, QuantizedIntegers)
    assert (q.shape, q.scales.shape) == ((24, 128), (24, 128 // (fmt.block_size or 128)))
    assert_storable(q)
    check_claims(W.to(dtype), G, quantizer, result, 1.0)
    zeros = initialize_calibrated(W * 0, G, quantizer, 4, iterations=2).quantized
    assert not zeros.codes.any()
    assert not zeros.scales.any()


def test_smaller_blocks_are_better() -> None:
    W, G = normal(48, 256), moments_of(correlated_inputs(1000, 256))
    errors = []
    for size in (32, 64, 128, 256):
        grid = grid_of(W, BlockwiseFormat("nf4", size))
        inputs = DampedMoments.of(G)
        Q = values(gptq(W, inputs.root, grid), grid)
        errors.append(objective(W - Q, inputs.moments))
    assert errors == sorted(errors)
    assert errors[-1] < 3 * errors[0]


def test_double_quantization_costs_little() -> None:
    """The codes are chosen for the absmax that will be read back, which then stay."""
    W, G = normal(96, 256), moments_of(correlated_inputs(2000, 256))
    exact, double = (
        initialize_calibrated(W, G, Blockwise(replace(FORMAT, double_quant=double_quant)), 8)
        for double_quant in (False, True)
    )
    assert double.output_error is not None
    assert exact.output_error is not None
    assert double.output_error < 1.1 * exact.output_error
    restored = restore_absmax(double.quantized)  # type: ignore[arg-type]
    assert restored.unique().numel() > 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_sixteen_bits(dtype: torch.dtype) -> None:
    W, G = normal(48, 128).to(dtype), moments_of(correlated_inputs(500, 128))
    result = initialize_calibrated(W, G, NF4, 4)
    check_claims(W, G, NF4, result, 1.0)
    for other in (W.t().contiguous().t(), W.clone()):
        again = initialize_calibrated(other, G, NF4, 4)
        assert torch.equal(again.quantized.packed, result.quantized.packed)  # type: ignore[union-attr]
        assert torch.equal(again.lora_A, result.lora_A)
        assert torch.equal(again.lora_B, result.lora_B)
        assert again.errors == result.errors


def test_the_range_of_the_runtimes_dtype_is_kept_to() -> None:
    W, G = normal(40, 64) * 2e4, moments_of(correlated_inputs(500, 64))
    W = W.clamp(-65000, 65000).half()
    result = initialize_calibrated(W, G, NF4, 4)
    assert NF4.dequantize(result.quantized).isfinite().all()  # type: ignore[arg-type]
    check_claims(W, G, NF4, result, 1.0)
    with pytest.raises(NonFiniteWeight, match="overflow"):
        initialize_calibrated(W.float() * 10, G, Blockwise(FORMAT, torch.float16), 4)


def test_without_a_rank_only_the_codes_are_chosen() -> None:
    W, G = normal(48, 128), moments_of(correlated_inputs(500, 128))
    result = initialize_calibrated(W, G, NF4, 0)
    assert result.lora_A.shape == (0, 128)
    assert result.lora_B.shape == (48, 0)
    check_claims(W, G, NF4, result, 1.0)
    assert result.output_error is not None
    assert result.quantized_only_output_error is not None
    assert result.output_error < 0.8 * result.quantized_only_output_error


def test_so_many_turns_as_are_asked_for() -> None:
    W, G = normal(48, 128), moments_of(correlated_inputs(500, 128))
    assert len(initialize_calibrated(W, G, NF4, 4, iterations=3).errors) == 3
    auto = initialize_calibrated(W, G, NF4, 4).errors
    assert 2 <= len(auto) <= 10
    assert all(b < a for a, b in pairwise(auto[:-1]))


def test_directions_that_carry_nothing_can_be_trained() -> None:
    result = initialize_calibrated(rank_one(48, 64) * 0, torch.eye(64), NF4, 4)
    assert not result.lora_B.any()
    assert result.lora_A.any(dim=1).all()


def test_what_cannot_be() -> None:
    W, G = normal(48, 64), torch.eye(64)

    def wrong(**changes: Any) -> Any:
        arguments = {"W": W, "input_moments": G, "quantizer": NF4, "rank": 4, **changes}
        return initialize_calibrated(**arguments)

    for changes in (
        {"input_moments": torch.eye(48)},
        {"input_moments": torch.zeros(64)},
        {"input_moments": -G},
        {"quantizer": Int8()},
        {"rank": 49},
        {"rank": -1},
        {"method": "gptq"},
        {"scaling": 0.0},
        {"iterations": 0},
        {"W": W.double()},
    ):
        with pytest.raises(InvalidSetting):
            wrong(**changes)
    for value in (torch.nan, torch.inf):
        bad = G.clone()
        bad[3, 5] = value
        with pytest.raises(LoftqError, match="calibration moments hold NaN"):
            wrong(input_moments=bad)
    with pytest.raises(LoftqError, match="not positive semidefinite"):
        wrong(input_moments=2 * G - torch.ones(64, 64))
    with pytest.raises(NonFiniteWeight):
        wrong(W=W.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(torch.nan)))


@pytest.mark.gpu
def test_the_gpu_ends_where_the_cpu_does() -> None:
    W, G = normal(192, 256), moments_of(correlated_inputs(2000, 256))
    for method in ("calibrated", "qera", "qera-diagonal"):
        there = initialize_calibrated(W.cuda(), G.cuda(), NF4, 8, method=method)
        here = initialize_calibrated(W, G, NF4, 8, method=method)
        assert there.lora_A.is_cuda
        assert there.output_error == pytest.approx(here.output_error, rel=1e-2)
