"""The column loops of calibrated starts: the compiled ones, and the readable ones they follow.

Where sums are added up in another order, a code near the border between two levels may be another,
and with it its row from there on. So each loop's codes are followed in float64: whatever was chosen
before, the next is to be the nearest.
"""

from types import ModuleType

import pytest
import torch
from test_calibrated import (
    correlated_inputs,
    grid_of,
    moments_of,
    normal,
    seeded,
    values,
)
from torch import Tensor

from loftq_cli.core import columns as readable
from loftq_cli.core import compiled_columns, gptq
from loftq_cli.core.blockwise import BlockwiseFormat
from loftq_cli.core.gptq import Grid
from loftq_cli.core.input_moments import DampedMoments
from loftq_cli.core.integers import IntegerFormat

FORMATS = [
    BlockwiseFormat("nf4", 64),
    BlockwiseFormat("fp4", 64),
    BlockwiseFormat("nf4", 64, bits=3),
    BlockwiseFormat("nf4", 64, bits=2),
    *(IntegerFormat(bits, 64) for bits in (2, 3, 4, 8)),
]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)
both = pytest.mark.parametrize("loops", [readable, compiled_columns], ids=["readable", "compiled"])


def targets(columns: int, rows: int) -> Tensor:
    """(columns × rows), and rows of zeros, of subnormals, of one value and with a huge one."""
    target = normal(columns, rows) * normal(rows, seed=1).exp()
    target[:, 3], target[:, 4], target[:, 5] = 0.0, 1e-40, -0.25
    target[7 % columns, 6] = 1e30
    return target


def scales_of(target: Tensor, grid: Grid) -> Tensor:
    """One a row, of either sign."""
    scales = target.abs().amax(dim=0).clamp_(1e-30) * 0.8 / grid.book.outermost
    scales[::3] *= -1.0
    return grid.possible(scales).expand_as(target).contiguous()


def nearest_but_for_rounding(ideal: Tensor, code: Tensor, scale: Tensor, grid: Grid) -> bool:
    place, levels = (ideal / scale.double())[:, None], grid.levels.double()
    distance = (place - levels).abs()
    chosen = distance.gather(1, code.long()[:, None])[:, 0]
    noise = 2e-6 * (place[:, 0].abs() + grid.book.outermost)
    return bool((chosen <= distance.amin(dim=1) + noise).all())


@both
@every_format
@pytest.mark.parametrize(("columns", "rows"), [(64, 70), (37, 32), (1, 9)])
def test_every_column_gets_the_code_nearest_to_what_was_passed_on(
    columns: int, rows: int, fmt: BlockwiseFormat | IntegerFormat, loops: ModuleType
) -> None:
    target = targets(columns, rows)
    grid = grid_of(torch.empty(rows, 64), fmt)
    scales, U = (
        scales_of(target, grid),
        torch.triu(normal(64, 64, seed=2) * 0.2 + 2 * torch.eye(64)),
    )
    U = U[:columns, :columns]
    chosen = torch.full((columns, rows), 255, dtype=torch.uint8)
    given = target.clone()
    found = loops.pass_on(target, scales, U, grid, chosen)
    assert torch.equal(target, given)
    assert torch.equal(found, grid.levels[chosen.int()] * scales)
    rest, factors = target.double(), U.double()
    for j in range(columns):
        assert nearest_but_for_rounding(rest[j], chosen[j], scales[j], grid)
        value = grid.levels[chosen[j].int()].double() * scales[j].double()
        rest[j + 1 :] -= factors[j, j + 1 :, None] * (rest[j] - value) / factors[j, j]


@both
@every_format
@pytest.mark.parametrize(("columns", "rows"), [(64, 70), (37, 32), (1, 9)])
def test_every_column_gets_the_code_best_beside_all_others(
    columns: int, rows: int, fmt: BlockwiseFormat | IntegerFormat, loops: ModuleType
) -> None:
    target = targets(columns, rows)
    target[7 % columns, 6] = 1e10  # squares of the errors are compared
    grid = grid_of(torch.empty(rows, 64), fmt)
    scales, G = scales_of(target, grid), moments_of(correlated_inputs(300, 64))[:columns, :columns]
    count = grid.levels.numel()
    chosen = torch.randint(count, (columns, rows), generator=seeded(4)).to(torch.uint8)
    old = grid.levels[chosen.int()] * scales
    slope = G @ (target - old)
    moved, level = loops.improve(slope, scales, G, grid, chosen)
    assert torch.equal(slope, G @ (target - old))
    assert torch.equal(level, grid.levels[chosen.int()])
    assert torch.allclose(moved, level * scales - old, rtol=1e-5, atol=1e-37)
    gradient, moments = slope.double(), G.double()
    for j in range(columns):
        ideal = old[j].double() + gradient[j] / moments[j, j]
        assert nearest_but_for_rounding(ideal, chosen[j], scales[j], grid)
        gradient -= moments[:, j : j + 1] * moved[j].double()


@every_format
@pytest.mark.parametrize("columns", [64, 200])
def test_a_compiled_search_ends_where_the_readable_one_does(
    columns: int, fmt: BlockwiseFormat | IntegerFormat
) -> None:
    block, weights = targets(columns, 70), torch.rand(columns, generator=seeded()) + 0.1
    block[7, 6] = 1e10
    grid = grid_of(torch.empty(70, 64), fmt)
    shares = tuple(share / grid.book.outermost for share in (1.0, 0.8, -1.0, -0.8))

    def cost(loops: ModuleType) -> Tensor:
        absmax = loops.search(block, weights, grid, shares, 1, 1e-30)
        assert torch.equal(grid.possible(absmax), absmax)
        level = grid.levels[grid.nearest(block / absmax)].double()
        rest = block.double() - level * absmax.double()
        return (rest.square() * weights[:, None].double()).sum(dim=0)

    whole = (block.double().square() * weights[:, None]).sum(dim=0)
    ours, theirs = cost(compiled_columns), cost(readable)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=0.0) or bool(
        ((ours - theirs).abs() <= 1e-6 * whole + 1e-5 * theirs).all()
    )


@pytest.mark.parametrize("fmt", [FORMATS[3], FORMATS[4], FORMATS[6]], ids=str)
def test_values_on_the_border_between_two_levels(fmt: BlockwiseFormat | IntegerFormat) -> None:
    """They take the lower one, among integers too; and none is below the lowest."""
    grid = grid_of(torch.empty(64, 64), fmt)
    border = torch.cat((grid.midpoints, torch.tensor([-grid.book.outermost - 0.5])))
    target = torch.stack((border, border - 1e-4, border + 1e-4))
    chosen = torch.zeros(target.shape, dtype=torch.uint8)
    compiled_columns.pass_on(target, torch.ones_like(target), torch.eye(3), grid, chosen)
    assert torch.equal(chosen, grid.nearest(target).to(torch.uint8))


@pytest.mark.parametrize(
    ("rows", "columns", "fmt"),
    [
        (400, 192, BlockwiseFormat("nf4", 64)),
        (300, 250, BlockwiseFormat("fp4", 32)),  # blocks reach over the ends of rows
        (300, 256, BlockwiseFormat("nf4", 128, bits=2)),
        (400, 192, IntegerFormat(4, 32)),
        (300, 250, IntegerFormat(3)),
        (100, 700, IntegerFormat(2)),
    ],
    ids=str,
)
def test_compiled_and_readable_loops_leave_the_same(
    rows: int, columns: int, fmt: BlockwiseFormat | IntegerFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    T, inputs = normal(rows, columns), DampedMoments.of(moments_of(correlated_inputs(900, columns)))
    T[5], T[6], T[7, 9] = 0.0, 1e-40, 300.0
    grid = grid_of(T, fmt)
    count = -(-T.numel() // grid.block_size)
    absmax = None if grid.aligned else torch.rand(count, generator=seeded()) + 1

    def left() -> list[Tensor]:
        rounding = gptq.gptq(T, inputs.root, grid, absmax)
        better = gptq.descend(T, inputs.moments, rounding, grid, sweeps=2, free=True)
        rests = [(T - values(each, grid)).double() for each in (rounding, better)]
        return [((R @ inputs.moments.double()) * R).sum(dim=1) for R in rests]

    assert gptq.column_loops(T, grid) is compiled_columns
    ours = left()
    monkeypatch.setattr(gptq, "column_loops", lambda *_: readable)
    for energies, expected in zip(ours, left(), strict=True):
        same = (energies - expected).abs() <= 1e-5 * expected + 1e-12
        assert same.float().mean() > 0.9
        # Rows where a code near a border went the other way end elsewhere, and no worse.
        assert float(energies.sum()) == pytest.approx(float(expected.sum()), rel=1e-2)
