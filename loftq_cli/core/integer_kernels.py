"""The compiled hot loops of integers, held to ``integers.py`` bit for bit.

Built like those of ``kernels.py``. Rounding needs no table: adding a number in whose neighbourhood
float32 has steps of 1, and taking it off again, rounds to the nearest integer, ties to even.
"""

from typing import Any

import numpy as np

from loftq_cli.core.kernels import (
    _SEGMENT,
    _compiled,
    _float,
    _inlined,
    _largest,
    _leave,
    _round,
    _store,
    _subtract,
    _to_bfloat16,
    _to_float16,
    sum_of_squares,
)

_STEPS_OF_ONE = np.float32(1.5 * 2**23)


@_inlined
def nearest_integer(value: Any, lowest: Any, highest: Any) -> Any:
    """That of the integers from ``lowest`` to ``highest``; all are float32."""
    value = highest if value > highest else value
    value = lowest if value < lowest else value
    return (value + _STEPS_OF_ONE) - _STEPS_OF_ONE


@_inlined
def possible_scale(scale: Any, largest: Any) -> Any:
    """``IntegerGrid.possible``."""
    scale = largest if scale > largest else scale
    scale = -largest if scale < -largest else scale
    if abs(scale) >= np.float32(2**-17):
        scale = _float(_to_bfloat16(scale))
    return _float(_to_float16(scale))


@_compiled
def quantize(
    W: Any,
    product: Any,
    size: Any,
    bounds: Any,
    share: Any,
    largest: Any,
    given: Any,
    rounding: Any,
    codes: Any,
    scales: Any,
    residual: Any,
) -> Any:
    """Quantize W − product, leave W − Q in ``residual`` and return ‖W − Q‖².

    ``bounds`` are the lowest and highest integer. Each block's scale is ``given``, or becomes the
    possible one nearest to ``share`` of its largest magnitude. All blocks are whole.

    An empty ``product`` is none, an empty ``residual`` is not wanted. Both are float32, or bfloat16
    bits in uint16.
    """
    lowest, highest = bounds
    segment = max(_SEGMENT // size, 1) * size
    rest = np.empty(segment, np.float32)
    target = np.empty(size, np.float32)
    total = 0.0
    for start in range(0, W.size, segment):
        r = rest[: min(segment, W.size - start)]
        for first in range(0, r.size, size):
            place = start + first
            w = W[place : place + size]
            _subtract(w, product[place : place + size], target)
            block = place // size
            if not given:
                scales[block] = possible_scale(_largest(target) * share, largest)
            scale = scales[block]
            reciprocal = np.float32(0.0) if scale == 0 else np.float32(1.0) / scale
            code = codes[place : place + size]
            for j in range(size):
                level = nearest_integer(target[j] * reciprocal, lowest, highest)
                code[j] = np.int8(level)
                target[j] = level * scale
            _leave(w, target, rounding, r[first : first + size])
        if residual.size:
            _store(r, residual[start : start + r.size])
            total += sum_of_squares(r)
    return total


@_compiled
def form_residual(W: Any, codes: Any, scales: Any, size: Any, rounding: Any, residual: Any) -> Any:
    """W − Q into ``residual``, from codes and scales, and ‖W − Q‖²."""
    segment = max(_SEGMENT // size, 1) * size
    difference = np.empty(segment, np.float32)
    dequantized = np.empty(segment, np.float32)
    total = 0.0
    for start in range(0, W.size, segment):
        w = W[start : start + segment]
        q, t = dequantized[: w.size], difference[: w.size]
        for first in range(0, w.size, size):
            code = codes[start + first : start + first + size]
            scale = scales[(start + first) // size]
            for j in range(size):
                q[first + j] = np.float32(code[j]) * scale
        _round(q, rounding)
        for j in range(w.size):
            t[j] = w[j] - q[j]
        _store(t, residual[start : start + w.size])
        total += sum_of_squares(t)
    return total
