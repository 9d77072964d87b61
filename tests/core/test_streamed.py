"""A weight that is fetched by rows gives, to the bit, what the weight in memory gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loftq_cli.core import compiled_step, loftq, sketches
from loftq_cli.core.blockwise import BlockwiseFormat
from loftq_cli.core.int8 import QuantizedInt8
from loftq_cli.core.quantizers import Blockwise, Int8
from loftq_cli.core.sketches import slab_columns
from loftq_cli.core.streamed import RowsOnDemand, StreamedResidual
from loftq_cli.errors import NonFiniteWeight

SHAPES = [(700, 1024), (1024, 704), (257, 1088)]


def weight(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    left = torch.randn(shape[0], 24, generator=generator)
    right = torch.randn(24, shape[1], generator=generator)
    noise = torch.randn(shape, generator=generator)
    return (0.02 * noise + 0.004 * left @ right).to(dtype)


class Watched(RowsOnDemand):
    """Rows of a tensor; remembers the most values that were asked for at once."""

    def __init__(self, W: Tensor) -> None:
        super().__init__((W.shape[0], W.shape[1]), W.dtype, self._rows)
        self.held = W
        self.most = 0

    def _rows(self, first: int, last: int) -> Tensor:
        self.most = max(self.most, (last - first) * self.held.shape[1])
        return self.held[first:last].clone()


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str, autouse=True)
def _products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several slabs even for small matrices, and sketches in either dtype."""
    monkeypatch.setattr(sketches, "SLAB", 1 << 16)
    monkeypatch.setattr(compiled_step, "product_dtype", lambda: request.param)


def assert_same(one: loftq.LoftqResult, other: loftq.LoftqResult) -> None:
    for field in ("packed", "absmax", "nested_absmax"):
        left, right = getattr(one.quantized, field), getattr(other.quantized, field)
        assert (left is None and right is None) or torch.equal(left, right), field
    assert torch.equal(one.lora_A, other.lora_A)
    assert torch.equal(one.lora_B, other.lora_B)
    assert (one.errors, one.error) == (other.errors, other.error)
    assert one.quantized_only_error == other.quantized_only_error


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits_as_in_memory(shape: tuple[int, int], double_quant: bool) -> None:
    W = weight(shape)
    quantizer = Blockwise(BlockwiseFormat("nf4", 32, double_quant))
    rows = Watched(W)
    assert_same(loftq.initialize(rows, quantizer, 8), loftq.initialize(W, quantizer, 8))
    assert rows.most < W.numel(), "never all of it at once"


@pytest.mark.parametrize("iterations", [0, 1])
def test_with_few_iterations(iterations: int) -> None:
    W = weight(SHAPES[0], torch.float32)
    quantizer = Blockwise(BlockwiseFormat("fp4", 64))
    one = loftq.initialize(Watched(W), quantizer, 8, iterations=iterations)
    assert_same(one, loftq.initialize(W, quantizer, 8, iterations=iterations))


@pytest.mark.parametrize("start", ["zero", "weight"])
def test_started_from_the_weight_and_without_a_search(start: str) -> None:
    W = weight(SHAPES[1])
    for quantizer in (
        Blockwise(BlockwiseFormat("nf4", 64, bits=2)),
        Blockwise(BlockwiseFormat("nf4", 64, True), search=False),
    ):
        options = {"start": start, "iterations": 3}
        rows = Watched(W)
        one = loftq.initialize(rows, quantizer, 8, **options)  # type: ignore[arg-type]
        assert_same(one, loftq.initialize(W, quantizer, 8, **options))  # type: ignore[arg-type]
        assert rows.most < W.numel()


def test_a_low_rank_that_dominates_is_found_with_exact_products() -> None:
    """There the residual is read again in float32, by rows too."""
    W = weight((512, 768))
    W[3] = 300.0
    quantizer = Blockwise(BlockwiseFormat("nf4", 64))
    assert_same(loftq.initialize(Watched(W), quantizer, 8), loftq.initialize(W, quantizer, 8))


def test_the_result_does_not_depend_on_threads() -> None:
    W, quantizer = weight(SHAPES[1]), Blockwise(BlockwiseFormat("nf4", 64))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(loftq.initialize(Watched(W), quantizer, 8))
    finally:
        torch.set_num_threads(before)
    assert_same(*results)


def test_products_with_a_streamed_residual() -> None:
    W = weight((300, 1216))
    _, held = compiled_step.step(W, None, BlockwiseFormat(), W.dtype)
    rows: object = Watched(W)
    _, streamed = compiled_step.step(rows, None, BlockwiseFormat(), W.dtype)  # type: ignore[arg-type]
    assert isinstance(streamed, StreamedResidual)
    assert streamed.matrix.numel() == 0
    assert (streamed.shape, streamed.energy) == (held.shape, held.energy)
    V, Y = torch.randn(1216, 5), torch.randn(300, 5)
    assert torch.equal(streamed.times(V), held.times(V))
    assert torch.equal(streamed.transposed_times(Y), held.transposed_times(Y))


@pytest.mark.parametrize(
    ("quantizer", "shape", "svd"),
    [
        (Int8(), (320, 512), "auto"),
        (Blockwise(BlockwiseFormat("nf4", 64)), (320, 256), "exact"),
        (Blockwise(BlockwiseFormat("nf4", 64)), (8, 16384), "auto"),
        (Blockwise(BlockwiseFormat("nf4", 64)), (320, 500), "auto"),
        (Blockwise(BlockwiseFormat("nf4", 64)), (20, 256), "auto"),
    ],
    ids=["int8", "exact", "few rows", "ragged blocks", "small"],
)
def test_what_cannot_be_streamed_is_gathered(
    quantizer: Blockwise | Int8, shape: tuple[int, int], svd: str
) -> None:
    W = weight(shape)
    one = loftq.initialize(Watched(W), quantizer, 4, svd=svd)
    other = loftq.initialize(W, quantizer, 4, svd=svd)
    if isinstance(one.quantized, QuantizedInt8):
        assert isinstance(other.quantized, QuantizedInt8)
        assert torch.equal(one.quantized.codes, other.quantized.codes)
    else:
        assert_same(one, other)


def test_what_is_not_finite_is_told_with_its_place() -> None:
    W = weight((700, 1024))
    W[650, 3] = torch.inf
    W[651, 0] = torch.nan
    with pytest.raises(NonFiniteWeight, match=r"2 of 716800 .* row 650, column 3"):
        loftq.initialize(Watched(W), Blockwise(BlockwiseFormat()), 8)


@pytest.mark.parametrize(("out_features", "block_size"), [(11008, 64), (53248, 64), (53248, 4096)])
def test_slabs_are_whole_blocks(out_features: int, block_size: int) -> None:
    columns = slab_columns(out_features, block_size)
    assert columns % block_size == columns % sketches.COLUMNS == 0
    assert columns == max(256, block_size) or columns * out_features <= sketches.SLAB
