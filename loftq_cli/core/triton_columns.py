"""The column loops of ``columns.py`` on CUDA, in Triton.

Rows are independent, so a program takes a few of them through all columns of a piece: what has to
be done one column after another stays in registers, and what it does to all other columns is one
product for the whole piece, which is left to others. Tensors are (columns × rows), as there, and
neighbouring rows neighbours in memory.
"""

import triton
import triton.language as tl

from loftq_cli.core.triton_kernels import choice, nearest, possible_scale


@triton.jit
def lower_nearest(value, BORDERS: tl.constexpr, LEVELS: tl.constexpr):
    """The nearest levels; here a tie goes to the lower of two integers too."""
    level = nearest(value, BORDERS, LEVELS)
    if len(BORDERS) == 0:
        level = tl.where(level - tl.maximum(value, LEVELS[0]) == 0.5, level - 1.0, level)
    return level


@triton.jit
def pick(value, BORDERS: tl.constexpr, LEVELS: tl.constexpr, INDICES: tl.constexpr):
    """The nearest levels and their indices."""
    level = lower_nearest(value, BORDERS, LEVELS)
    if len(BORDERS) > 0:
        index = choice(value, BORDERS, INDICES, tl.int32)
    else:
        index = (level - LEVELS[0]).to(tl.int32)
    return level, index


@triton.jit
def piece(columns, rows, stride, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """This program's columns and rows, where their values are, and which there are."""
    column = tl.arange(0, COLUMNS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = column.to(tl.int64)[:, None] * stride + row[None, :]
    return column, row, place, (column < columns)[:, None] & (row < rows)[None, :]


@triton.jit
def pass_on(
    target, scales, U, chosen, values, columns, rows,
    target_stride, chosen_stride, U_down, U_across,
    BORDERS: tl.constexpr, LEVELS: tl.constexpr, INDICES: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rounds column after column of ``target`` and takes its error from those that follow.

    ``scales`` and the ``values`` that codes stand for (columns × rows) are contiguous, the others
    of these strides.
    """
    column, row, place, inside = piece(columns, rows, target_stride, COLUMNS, ROWS)
    there = row < rows
    ideals = tl.load(target + place, mask=inside, other=0.0)
    for j in range(columns):
        ideal = tl.sum(tl.where((column == j)[:, None], ideals, 0.0), axis=0)
        scale = tl.load(scales + j * rows + row, mask=there, other=1.0)
        level, index = pick(tl.div_rn(ideal, scale), BORDERS, LEVELS, INDICES)
        value = level * scale
        diagonal = tl.load(U + j * (U_down + U_across))
        after = (column > j) & (column < columns)
        across = tl.load(U + j * U_down + column * U_across, mask=after, other=0.0)
        error = tl.div_rn(ideal - value, diagonal)
        ideals -= across[:, None] * error[None, :]
        tl.store(chosen + j * chosen_stride + row, index.to(tl.uint8), mask=there)
        tl.store(values + j * rows + row, value, mask=there)


@triton.jit
def improve(
    slope, old, scales, G, chosen, moved, columns, rows,
    slope_stride, chosen_stride, moved_stride, G_down, G_across,
    BORDERS: tl.constexpr, LEVELS: tl.constexpr, INDICES: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Takes column after column to the best code while all others stay; ``moved`` says how far.

    ``old`` and ``scales`` (columns × rows) are contiguous, the others of these strides.
    """
    column, row, place, inside = piece(columns, rows, slope_stride, COLUMNS, ROWS)
    there = row < rows
    gradients = tl.load(slope + place, mask=inside, other=0.0)
    for j in range(columns):
        gradient = tl.sum(tl.where((column == j)[:, None], gradients, 0.0), axis=0)
        scale = tl.load(scales + j * rows + row, mask=there, other=1.0)
        value = tl.load(old + j * rows + row, mask=there, other=0.0)
        diagonal = tl.load(G + j * (G_down + G_across))
        ideal = value + gradient * tl.div_rn(1.0, diagonal)
        level, index = pick(tl.div_rn(ideal, scale), BORDERS, LEVELS, INDICES)
        after = (column > j) & (column < columns)
        across = tl.load(G + j * G_down + column * G_across, mask=after, other=0.0)
        move = level * scale - value
        gradients -= across[:, None] * move[None, :]
        tl.store(chosen + j * chosen_stride + row, index.to(tl.uint8), mask=there)
        tl.store(moved + j * moved_stride + row, move, mask=there)


@triton.jit
def possible(absmax, unit, most, smallest, BORDERS: tl.constexpr):
    """``Grid.possible``; a power of two, ``unit``, rounds nothing."""
    if len(BORDERS) == 0:
        absmax = possible_scale(tl.div_rn(absmax, unit), most) * unit
        absmax = tl.where(absmax == 0, smallest, absmax)
    return absmax


@triton.jit
def search(
    block, weights, shares, found, count, rounds, unit, most, largest, smallest,
    columns, rows, stride,
    BORDERS: tl.constexpr, LEVELS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The absmax of each row of a ``block`` that rounds it best in the weighted square.

    It is looked for at ``count`` shares of the largest magnitude, each improved ``rounds`` times.
    """
    column, row, place, inside = piece(columns, rows, stride, COLUMNS, ROWS)
    values = tl.load(block + place, mask=inside, other=0.0)
    weight = tl.load(weights + column, mask=column < columns, other=0.0)[:, None]
    peak = tl.max(tl.abs(values), axis=0)
    peak = tl.minimum(tl.maximum(peak, smallest), largest)
    best = peak
    least = tl.full(peak.shape, float("inf"), tl.float32)
    for start in range(count):
        absmax = possible(peak * tl.load(shares + start), unit, most, smallest, BORDERS)
        for _ in range(rounds + 1):
            value = tl.div_rn(values, tl.broadcast_to(absmax[None, :], values.shape))
            level = lower_nearest(value, BORDERS, LEVELS)
            weighted = weight * level
            cross = tl.sum(weighted * values, axis=0)
            square = tl.sum(weighted * level, axis=0)
            # The square of the error without the block's own, which is the same for all.
            cost = absmax * (absmax * square - 2.0 * cross)
            better = cost < least
            best = tl.where(better, absmax, best)
            least = tl.where(better, cost, least)
            fitted = tl.div_rn(cross, tl.maximum(square, smallest))
            fitted = possible(fitted, unit, most, smallest, BORDERS)
            usable = (tl.abs(fitted) > smallest) & (tl.abs(fitted) <= largest)
            absmax = tl.where(usable, fitted, absmax)
    tl.store(found + row, best, mask=row < rows)
