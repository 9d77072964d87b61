"""The search for every block's absmax, compiled: ``absmax.search_absmax`` bit for bit.

Many blocks are searched at once, one in each lane: the values of a group are turned around, first
all blocks' first, then all blocks' second. So the loops over a group have no sums in them, and the
sums add long runs to long runs.
"""

from typing import Any

import numpy as np

from loftq_cli.core.kernels import _bits, _choice, _compiled, _float

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
        top = np.uint32(0)
        block[w.size :] = np.float32(0.0)
        if product.size:
            p = product[start : start + size]
            if product.itemsize == 4:
                for j in range(w.size):
                    block[j] = w[j] - np.float32(p[j])
            else:
                for j in range(w.size):
                    block[j] = w[j] - _float(np.uint32(p[j]) << np.uint32(16))
        else:
            for j in range(w.size):
                block[j] = w[j]
        for j in range(size):
            magnitude = _bits(block[j]) & np.uint32(0x7FFFFFFF)
            top = magnitude if magnitude > top else top
        peak[b] = _float(top)
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
        for b in range(count):
            level = _choice(v[b] * scale[b], borders, levels)
            a[b] = level * v[b]
            q[b] = level * level
    half = values.size // 2
    while half >= count:
        left, right = along[:half], along[half : 2 * half]
        for j in range(half):
            left[j] += right[j]
        left, right = square[:half], square[half : 2 * half]
        for j in range(half):
            left[j] += right[j]
        half //= 2


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
    what ``passes`` begin with. Where what they find is above ``largest``, or too small to divide
    by, the largest magnitude is taken.
    """
    one = np.float32(1.0)
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
            base[b] = previous[first + b] / peak[b] if previous.size else one
            if not (abs(base[b]) > np.float32(1e-3) and abs(base[b]) < np.float32(1e3)):
                base[b] = one
            best[b], most[b] = one, np.float32(0.0)
        for factor in factors:
            for b in range(count):
                at[b] = base[b] * factor
            for _ in range(passes):
                for b in range(count):
                    scale[b] = one / at[b]
                _project(values, scale, borders, levels, along, square)
                for b in range(count):
                    at[b] = along[b] / square[b] if abs(along[b]) > 0 else one
                    gain = along[b] * at[b]
                    if gain > most[b]:
                        best[b], most[b] = at[b], gain
        for b in range(count):
            found = best[b] * peak[b]
            usable = abs(found) >= np.float32(1e-38) and abs(found) <= largest
            absmax[first + b] = found if usable else peak[b]
