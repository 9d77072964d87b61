"""The compiled hot loops of blockwise quantization, held to ``blockwise.py`` bit for bit.

Those of integers (``integer_kernels.py``), of the search (``search_kernels.py``) and of calibrated
starts (``column_kernels.py``) are made of the same parts.

Each function takes a flat run of whole blocks (the very last may be ragged) and keeps to one
thread, outside Python's lock: what runs beside it is its caller's business. They are compiled on
first use and cached on disk.

The loops are written for the vectorizer: no branches, no gathers. A value finds its place among
fifteen borders by fifteen selects, for its level and its code alike; the largest magnitude is the
largest of the bits; and as numpy has no bfloat16, that and float16 are arithmetic on the bits of a
float32.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

# How a dequantized value is rounded.
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2

# Values that are worked on at a time: a few arrays of them stay in the first cache.
_SEGMENT = 8192


def _jit(**options: Any) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        options.update(nogil=True, error_model="numpy")
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # neither the package nor the home directory can be written to
            return njit(**options)(function)

    return decorate


_compiled = _jit()
_inlined = _jit(inline="always")


@intrinsic
def _bits(typing_context: Any, value: Any) -> Any:
    """The bits of a float32, as uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def _float(typing_context: Any, bits: Any) -> Any:
    """The float32 with these bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@_inlined
def _to_bfloat16(value: Any) -> Any:
    """The value's bfloat16 in the upper half of a float32's bits: to nearest, ties to even."""
    u = _bits(value)
    return (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)


@_inlined
def _to_float16(value: Any) -> Any:
    """The float32 bits of the value's float16: to nearest, ties to even."""
    u = _bits(value)
    sign = u & np.uint32(0x80000000)
    u = u ^ sign
    rounded = (u + np.uint32(0xFFF) + ((u >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
    rounded = np.uint32(0x7F800000) if rounded >= np.uint32(0x47800000) else rounded
    # Below 2^-14 float16 has steps of 2^-24, and so has float32 between a half and one.
    half = np.float32(0.5)
    small = _bits((_float(u) + half) - half)
    return (small if u < np.uint32(0x38800000) else rounded) | sign


@_inlined
def _round(values: Any, rounding: Any) -> None:
    if rounding == BFLOAT16:
        for j in range(values.size):
            values[j] = _float(_to_bfloat16(values[j]))
    elif rounding == FLOAT16:
        for j in range(values.size):
            values[j] = _float(_to_float16(values[j]))


@_jit(fastmath={"reassoc"})
def sum_of_squares(values: Any) -> Any:
    """In float64, in an order that is fast and always the same."""
    total = 0.0
    for j in range(values.size):
        value = np.float64(values[j])
        total += value * value
    return total


@_inlined
def _store(values: Any, out: Any) -> None:
    if out.itemsize == 4:
        for j in range(values.size):
            out[j] = values[j]
    else:
        for j in range(values.size):
            out[j] = _to_bfloat16(values[j]) >> np.uint32(16)


@_inlined
def _choice(value: Any, borders: Any, choices: Any) -> Any:
    """That of sixteen ``choices`` whose place the ``value`` has among 15 ascending borders."""
    b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14 = borders
    c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14, c15 = choices
    found = c0
    found = c1 if value > b0 else found
    found = c2 if value > b1 else found
    found = c3 if value > b2 else found
    found = c4 if value > b3 else found
    found = c5 if value > b4 else found
    found = c6 if value > b5 else found
    found = c7 if value > b6 else found
    found = c8 if value > b7 else found
    found = c9 if value > b8 else found
    found = c10 if value > b9 else found
    found = c11 if value > b10 else found
    found = c12 if value > b11 else found
    found = c13 if value > b12 else found
    found = c14 if value > b13 else found
    found = c15 if value > b14 else found
    return found


@_inlined
def _subtract(w: Any, product: Any, target: Any) -> None:
    """w − product into ``target``. An empty product is none."""
    if product.size == 0:
        target[:] = w
    elif product.itemsize == 4:
        for j in range(w.size):
            target[j] = w[j] - np.float32(product[j])
    else:
        for j in range(w.size):
            target[j] = w[j] - _float(np.uint32(product[j]) << np.uint32(16))


@_inlined
def _largest(target: Any) -> Any:
    """The largest magnitude."""
    top = np.uint32(0)
    for j in range(target.size):
        magnitude = _bits(target[j]) & np.uint32(0x7FFFFFFF)
        top = magnitude if magnitude > top else top
    return _float(top)


@_inlined
def _leave(w: Any, target: Any, rounding: Any, rest: Any) -> None:
    """w − Q into ``rest``, where ``target`` holds Q before it is rounded."""
    if rounding == FLOAT32:
        for j in range(w.size):
            rest[j] = w[j] - target[j]
    elif rounding == BFLOAT16:
        for j in range(w.size):
            rest[j] = w[j] - _float(_to_bfloat16(target[j]))
    else:
        for j in range(w.size):
            rest[j] = w[j] - _float(_to_float16(target[j]))


@_inlined
def _encode(
    W: Any,
    product: Any,
    size: Any,
    borders: Any,
    levels: Any,
    codes: Any,
    given: Any,
    rounding: Any,
    packed: Any,
    absmax: Any,
    residual: Any,
) -> None:
    """Codes of W − product, two a byte, an absmax a block, and the float32 residual W − Q.

    ``borders`` are 15 ascending float32, ``levels`` and ``codes`` the 16 choices they separate.
    """
    scaled = np.empty(size, np.float32)
    # As wide as a float32, so that one comparison serves code and level.
    chosen = np.empty(size + size % 2, np.int32)
    two = chosen.view(np.uint64)
    smallest = np.float32(1e-38)
    for block in range(absmax.size):
        start = block * size
        w = W[start : start + size]
        rest = residual[start : start + size]
        target = scaled[: w.size]
        _subtract(w, product[start : start + size], target)
        peak = absmax[block] if given else _largest(target)
        scale = np.float32(1.0) / max(abs(peak), smallest)
        scale = -scale if peak < 0 else scale
        if not given and target.size < size:
            # The ragged block is divided, and its peak is stored as it was used.
            peak = max(peak, smallest)
            scale = np.float32(1.0)
            for j in range(target.size):
                target[j] /= peak
        absmax[block] = peak
        for j in range(target.size):
            s = target[j] * scale
            chosen[j] = _choice(s, borders, codes)
            target[j] = _choice(s, borders, levels) * peak
        if target.size % 2:
            chosen[target.size] = codes[7]
        pairs = packed[start // 2 : (start + target.size + 1) // 2]
        for j in range(pairs.size):
            pairs[j] = np.uint8((two[j] << np.uint64(4)) | (two[j] >> np.uint64(32)))
        _leave(w, target, rounding, rest)


@_compiled
def quantize(
    W: Any,
    product: Any,
    size: Any,
    borders: Any,
    levels: Any,
    codes: Any,
    given: Any,
    rounding: Any,
    packed: Any,
    absmax: Any,
    residual: Any,
) -> Any:
    """Quantize W − product, leave W − Q in ``residual`` and return ‖W − Q‖².

    Each block's ``absmax`` is ``given``, or becomes its largest magnitude.

    An empty ``product`` is none, an empty ``residual`` is not wanted. Both are float32, or bfloat16
    bits in uint16.
    """
    segment = max(_SEGMENT // size, 1) * size
    rest = np.empty(segment, np.float32)
    total = 0.0
    for start in range(0, W.size, segment):
        stop = min(start + segment, W.size)
        r = rest[: stop - start]
        _encode(
            W[start:stop],
            product[start:stop],
            size,
            borders,
            levels,
            codes,
            given,
            rounding,
            packed[start // 2 : (stop + 1) // 2],
            absmax[start // size : (stop + size - 1) // size],
            r,
        )
        if residual.size:
            _store(r, residual[start:stop])
            total += sum_of_squares(r)
    return total


@_compiled
def form_residual(
    W: Any, packed: Any, absmax: Any, size: Any, table: Any, rounding: Any, residual: Any
) -> Any:
    """W − Q into ``residual``, from stored codes and absmax, and ‖W − Q‖².

    ``table`` holds the level of each code.
    """
    segment = max(_SEGMENT // size, 1) * size
    difference = np.empty(segment, np.float32)
    dequantized = np.empty(segment, np.float32)
    total = 0.0
    for start in range(0, W.size, segment):
        w = W[start : start + segment]
        q, t = dequantized[: w.size], difference[: w.size]
        for first in range(0, w.size, size):
            values = q[first : first + size]
            pairs = packed[(start + first) // 2 : (start + first + size) // 2]
            scale = absmax[(start + first) // size]
            for j in range(values.size // 2):
                values[2 * j] = table[pairs[j] >> np.uint8(4)] * scale
                values[2 * j + 1] = table[pairs[j] & np.uint8(15)] * scale
            if values.size % 2:
                values[values.size - 1] = table[pairs[values.size // 2] >> np.uint8(4)] * scale
        _round(q, rounding)
        for j in range(w.size):
            t[j] = w[j] - q[j]
        _store(t, residual[start : start + w.size])
        total += sum_of_squares(t)
    return total
