"""The search for every block's absmax or scale, compiled: ``absmax.search_absmax`` bit for bit.

Many blocks are searched at once, one in each lane: the values of a group are turned around, first
all blocks' first, then all blocks' second. So the loops over a group have no sums in them, and the
sums add long runs to long runs.

Levels are sixteen between fifteen ``borders``, or without borders (None) the integers from the
first of two ``levels`` to the last. What depends on that is decided when a loop is compiled.
"""

from typing import Any

import numpy as np

from loftq_cli.core.integer_kernels import nearest_integer, possible_scale
from loftq_cli.core.kernels import _choice, _compiled, _inlined, _largest, _subtract

# Values in a group, and the fewest blocks.
_GROUP, _LANES = 8192, 16


@_compiled
def _load(W: Any, product: Any, size: Any, first: Any, values: Any, peak: Any) -> None:
    """The blocks of W − product from ``first`` on, turned around and divided by their ``peak``."""
    count = peak.size
    block = np.empty(size, np.float32)
    for b in range(count):
        start = (first + b) * size
        w = W[start : start + size]
        block[w.size :] = np.float32(0.0)
        _subtract(w, product[start : start + size], block[: w.size])
        peak[b] = _largest(block)
        scale = np.float32(1.0) / max(peak[b], np.float32(1e-38))
        for j in range(size):
            values[j * count + b] = block[j] * scale


@_compiled
def _project(values: Any, scale: Any, borders: Any, levels: Any, along: Any, square: Any) -> None:
    """Σ level·value and Σ level² of every block, for the levels nearest to value·scale.

    They end up at the beginnings of ``along`` and ``square``.
    """
    count = scale.size
    for start in range(0, values.size, count):
        v = values[start : start + count]
        a = along[start : start + count]
        q = square[start : start + count]
        if borders is None:
            for b in range(count):
                level = nearest_integer(v[b] * scale[b], levels[0], levels[-1])
                a[b] = level * v[b]
                q[b] = level * level
        else:
            for b in range(count):
                level = _choice(v[b] * scale[b], borders, levels)
                a[b] = level * v[b]
                q[b] = level * level
    size = values.size // count
    while size > 1:
        half = (size + 1) // 2
        for sums in (along, square):
            left, right = sums[: (size - half) * count], sums[half * count : size * count]
            for j in range(left.size):
                left[j] += right[j]
        size = half


@_inlined
def _possible(share: Any, peak: Any, largest: Any) -> Any:
    """The nearest share of the peak that can be stored; 0 where none is."""
    return possible_scale(share * peak, largest) / peak if peak > 0 else np.float32(0.0)


@_compiled
def search(
    W: Any,
    product: Any,
    size: Any,
    borders: Any,
    levels: Any,
    previous: Any,
    factors: Any,
    passes: Any,
    largest: Any,
    absmax: Any,
) -> None:
    """The ``absmax`` of every block of W − product.

    ``factors`` times the ``previous`` one, or if that is empty times the largest magnitude, are
    what a pass begins with; the best then gets the rest of its ``passes``. What they find is not
    above ``largest``, nor too small to divide by: there an absmax becomes the largest magnitude,
    and a scale 0.
    """
    one, zero = np.float32(1.0), np.float32(0.0)
    outermost = -levels[0]
    usual = one / outermost
    group = max(_GROUP // size, _LANES)
    buffers = np.empty((3, group * size), np.float32)
    small = np.empty((6, group), np.float32)
    for first in range(0, absmax.size, group):
        count = min(group, absmax.size - first)
        values = buffers[0, : count * size]
        along, square = buffers[1, : count * size], buffers[2, : count * size]
        peak, base, at = small[0, :count], small[1, :count], small[2, :count]
        scale, best, most = small[3, :count], small[4, :count], small[5, :count]
        _load(W, product, size, first, values, peak)
        for b in range(count):
            base[b] = previous[first + b] / peak[b] if previous.size else usual
            share = abs(base[b]) * outermost
            if not (share > np.float32(1e-3) and share < np.float32(1e3)):
                base[b] = usual
            best[b], most[b] = zero, zero
        for turn in range(factors.size + passes - 1):
            if turn < factors.size:
                for b in range(count):
                    at[b] = base[b] * factors[turn]
                    if borders is None:
                        at[b] = _possible(at[b], peak[b], largest)
            else:
                at[:] = best
            for b in range(count):
                scale[b] = one / (at[b] if abs(at[b]) > 0 else usual)
            _project(values, scale, borders, levels, along, square)
            for b in range(count):
                at[b] = along[b] / square[b] if abs(along[b]) > 0 else zero
                if borders is None:
                    at[b] = _possible(at[b], peak[b], largest)
                    gain = at[b] * (np.float32(2.0) * along[b] - at[b] * square[b])
                else:
                    gain = along[b] * at[b]
                if gain > most[b]:
                    best[b], most[b] = at[b], gain
        for b in range(count):
            found = best[b] * peak[b]
            if borders is None:
                absmax[first + b] = possible_scale(found, largest)
            else:
                usable = abs(found) >= np.float32(1e-38) and abs(found) <= largest
                absmax[first + b] = found if usable else peak[b]
