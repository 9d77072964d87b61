"""The column loops of calibrated starts, compiled: those of ``columns.py``.

Rows are independent, so a few of them are taken through all columns of a piece while what was done
to those stays in the first cache, one row in each lane. What columns before it pass on to a column
is added up when it is reached, in the order in which the readable loops pass it on.

Levels are sixteen between fifteen ``borders``, or without borders (None) the integers from the
first of two ``levels`` to the last, as in ``search_kernels.py``; ``indices`` are those of the
sixteen. Sums may be contracted (fused multiply-add), so that a code near the border between two
levels may be another than that of the readable loops.
"""

from typing import Any

import numpy as np

from loftq_cli.core.integer_kernels import nearest_integer, possible_scale
from loftq_cli.core.kernels import _choice, _compiled, _inlined, _jit

# Rows that are worked on at a time. No loop is over this constant itself: a short loop of known
# length is unrolled before it could be vectorized.
_LANES = 64

# Of products that are added up.
_contracted = _jit(fastmath={"contract"})


@_inlined
def _lower_nearest(value: Any, lowest: Any, highest: Any) -> Any:
    """The nearest integer; of two that are equally near the lower one."""
    value = lowest if value < lowest else value
    level = nearest_integer(value, lowest, highest)
    return level - np.float32(1.0) if level - value == np.float32(0.5) else level


@_contracted
def _take_off(sums: Any, factors: Any, j: Any, values: Any) -> None:
    """Takes Σ factors[i, j] · values[i] over the columns i < j off the ``sums``, lane by lane."""
    whole = j // 4 * 4
    for i in range(0, whole, 4):  # four while the sums are at hand
        f0, f1, f2, f3 = factors[i, j], factors[i + 1, j], factors[i + 2, j], factors[i + 3, j]
        v0, v1, v2, v3 = values[i], values[i + 1], values[i + 2], values[i + 3]
        for lane in range(sums.size):
            total = sums[lane]
            total -= f0 * v0[lane]
            total -= f1 * v1[lane]
            total -= f2 * v2[lane]
            total -= f3 * v3[lane]
            sums[lane] = total
    for i in range(whole, j):
        factor, value = factors[i, j], values[i]
        for lane in range(sums.size):
            sums[lane] -= factor * value[lane]


@_compiled
def _pick(
    ideal: Any, scales: Any, borders: Any, levels: Any, indices: Any, codes: Any, level: Any
) -> None:
    """The nearest codes to ``ideal``, and their levels."""
    if borders is None:
        for lane in range(ideal.size):
            level[lane] = _lower_nearest(ideal[lane] / scales[lane], levels[0], levels[-1])
            codes[lane] = np.uint8(np.int32(level[lane] - levels[0]))
    else:
        for lane in range(ideal.size):
            place = ideal[lane] / scales[lane]
            codes[lane] = np.uint8(_choice(place, borders, indices))
            level[lane] = _choice(place, borders, levels)


@_compiled
def pass_on(
    target: Any,
    scales: Any,
    U: Any,
    borders: Any,
    levels: Any,
    indices: Any,
    chosen: Any,
    values: Any,
) -> None:
    """``columns.pass_on``, its result in ``values``."""
    columns, rows = target.shape
    errors = np.zeros((columns, _LANES), np.float32)
    ideal, level = np.zeros(_LANES, np.float32), np.empty(_LANES, np.float32)
    for first in range(0, rows, _LANES):
        last = min(first + _LANES, rows)
        count = last - first
        for j in range(columns):
            ideal[:count] = target[j, first:last]
            _take_off(ideal, U, j, errors)
            scale, code = scales[j, first:last], chosen[j, first:last]
            _pick(ideal[:count], scale, borders, levels, indices, code, level)
            value, error, diagonal = values[j, first:last], errors[j], U[j, j]
            for lane in range(count):
                value[lane] = level[lane] * scale[lane]
                error[lane] = (ideal[lane] - value[lane]) / diagonal


@_compiled
def improve(
    slope: Any,
    scales: Any,
    G: Any,
    table: Any,
    borders: Any,
    levels: Any,
    indices: Any,
    chosen: Any,
    moved: Any,
    now: Any,
) -> None:
    """``columns.improve``, its results in ``moved`` and ``now``; ``table`` are all levels."""
    columns, rows = slope.shape
    moves = np.zeros((columns, _LANES), np.float32)
    gradient, old = np.zeros(_LANES, np.float32), np.empty(_LANES, np.float32)
    for first in range(0, rows, _LANES):
        last = min(first + _LANES, rows)
        count = last - first
        for j in range(columns):
            gradient[:count] = slope[j, first:last]
            _take_off(gradient, G, j, moves)
            scale, code, level = scales[j, first:last], chosen[j, first:last], now[j, first:last]
            reciprocal = np.float32(1.0) / G[j, j]
            for lane in range(count):
                old[lane] = table[code[lane]] * scale[lane]
                gradient[lane] = old[lane] + gradient[lane] * reciprocal
            _pick(gradient[:count], scale, borders, levels, indices, code, level)
            move = moves[j]
            for lane in range(count):
                move[lane] = level[lane] * scale[lane] - old[lane]
            moved[j, first:last] = move[:count]


@_inlined
def _possible(absmax: Any, borders: Any, unit: Any, most: Any, smallest: Any) -> Any:
    """``Grid.possible``."""
    if borders is None:
        absmax = possible_scale(absmax / unit, most) * unit
        absmax = smallest if absmax == 0 else absmax
    return absmax


@_contracted
def _fit(
    values: Any, weights: Any, absmax: Any, borders: Any, levels: Any, cross: Any, square: Any
) -> None:
    """Σ weight·level·value and Σ weight·level² of every lane, for the nearest levels."""
    reciprocal = np.float32(1.0) / absmax
    cross[:] = np.float32(0.0)
    square[:] = np.float32(0.0)
    for j in range(weights.size):
        weight, value = weights[j], values[j]
        if borders is None:
            for lane in range(cross.size):
                level = _lower_nearest(value[lane] * reciprocal[lane], levels[0], levels[-1])
                cross[lane] += weight * level * value[lane]
                square[lane] += weight * level * level
        else:
            for lane in range(cross.size):
                level = _choice(value[lane] * reciprocal[lane], borders, levels)
                cross[lane] += weight * level * value[lane]
                square[lane] += weight * level * level


@_compiled
def search(
    block: Any,
    weights: Any,
    borders: Any,
    levels: Any,
    shares: Any,
    rounds: Any,
    unit: Any,
    most: Any,
    largest: Any,
    smallest: Any,
    found: Any,
) -> None:
    """``columns.search``, its result in ``found``."""
    columns, rows = block.shape
    values = np.empty((columns, _LANES), np.float32)
    small = np.empty((6, _LANES), np.float32)
    peak, best, least = small[0], small[1], small[2]
    absmax, cross, square = small[3], small[4], small[5]
    for first in range(0, rows, _LANES):
        count = min(_LANES, rows - first)
        peak[:] = smallest
        for j in range(columns):
            value = values[j]
            value[:count] = block[j, first : first + count]
            value[count:] = np.float32(0.0)
            for lane in range(best.size):
                magnitude = abs(value[lane])
                peak[lane] = magnitude if magnitude > peak[lane] else peak[lane]
        for lane in range(best.size):
            peak[lane] = min(peak[lane], largest)
            best[lane], least[lane] = peak[lane], np.float32(np.inf)
        for share in shares:
            for lane in range(best.size):
                absmax[lane] = _possible(peak[lane] * share, borders, unit, most, smallest)
            for _ in range(rounds + 1):
                _fit(values, weights, absmax, borders, levels, cross, square)
                for lane in range(best.size):
                    at = absmax[lane]
                    cost = at * (at * square[lane] - np.float32(2.0) * cross[lane])
                    if cost < least[lane]:
                        best[lane], least[lane] = at, cost
                    fitted = cross[lane] / max(square[lane], smallest)
                    fitted = _possible(fitted, borders, unit, most, smallest)
                    if abs(fitted) > smallest and abs(fitted) <= largest:
                        absmax[lane] = fitted
        found[first : first + count] = best[:count]
