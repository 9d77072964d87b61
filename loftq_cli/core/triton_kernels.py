"""The kernels of blocks on CUDA, in Triton: the rules of ``absmax.py``, ``blockwise.py`` and
``integers.py``.

A program works on a tile of whole blocks, (blocks × values): everything between reading a weight
and writing its codes stays in registers. A ``SIZE`` that is no power of two is filled up to the
``WIDTH`` that is one, with zeros, which take the level zero and add nothing.

Held to the reference to the bit but for sums, whose order is the machine's. So divisions are
rounded correctly (``div_rn``), and whoever launches these turns contraction to fused
multiply-adds off. bfloat16 is arithmetic on the bits of a float32, as in ``kernels.py``:
Triton's interpreter, in which the tests run these without a GPU, cuts it off instead of rounding.

Levels are ``LEVELS`` between ``BORDERS``, or without borders the integers from the first of two to
the second. These tables are part of the compiled code, which Triton can since 3.4. ``smallest``
comes as an argument: a constant below the smallest normal float32 would count as float64.
"""

import triton
import triton.language as tl

# How a dequantized value is rounded.
FLOAT32, BFLOAT16, FLOAT16 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# A search looks around the absmax that a similar block had, unless it is out of proportion.
NEAREST, FARTHEST = tl.constexpr(1e-3), tl.constexpr(1e3)
# Added and taken off again it rounds to an integer: there float32 has steps of 1.
STEPS_OF_ONE = tl.constexpr(1.5 * 2**23)


@triton.jit
def to_bfloat16(value):
    """The bfloat16 nearest to each float32, a tie to the even one, as float32."""
    bits = value.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.to(tl.float32, bitcast=True)


@triton.jit
def to_runtime(value, ROUNDING: tl.constexpr):
    if ROUNDING == BFLOAT16:
        value = to_bfloat16(value)
    elif ROUNDING == FLOAT16:
        value = value.to(tl.float16).to(tl.float32)
    return value


@triton.jit
def read(pointers, inside):
    """As float32, zero where it is not ``inside``. Bits of bfloat16 come as uint16."""
    value = tl.load(pointers, mask=inside, other=0)
    if value.dtype == tl.uint16:
        value = (value.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def choice(value, BORDERS: tl.constexpr, CHOICES: tl.constexpr, dtype: tl.constexpr):
    """That of the ``CHOICES`` whose place each value has among the ascending ``BORDERS``."""
    found = tl.full(value.shape, CHOICES[0], dtype)
    for i in tl.static_range(len(BORDERS)):
        found = tl.where(value > BORDERS[i], CHOICES[i + 1], found)
    return found


@triton.jit
def nearest(value, BORDERS: tl.constexpr, LEVELS: tl.constexpr):
    """The levels nearest to values of blocks whose absmax is 1."""
    if len(BORDERS) > 0:
        level = choice(value, BORDERS, LEVELS, tl.float32)
    else:
        value = tl.minimum(tl.maximum(value, LEVELS[0]), LEVELS[1])
        level = (value + STEPS_OF_ONE) - STEPS_OF_ONE
    return level


@triton.jit
def possible_scale(scale, largest):
    """``IntegerGrid.possible``."""
    scale = tl.minimum(tl.maximum(scale, -largest), largest)
    scale = tl.where(tl.abs(scale) < 2**-17, scale, to_bfloat16(scale))
    return scale.to(tl.float16).to(tl.float32)


@triton.jit
def possible_share(share, peak, largest, BORDERS: tl.constexpr):
    """The nearest share of the peak that can be stored; 0 where none is."""
    if len(BORDERS) == 0:
        divisor = tl.where(peak > 0, peak, 1.0)
        stored = tl.div_rn(possible_scale(share * peak, largest), divisor)
        share = tl.where(peak > 0, stored, 0.0)
    return share


@triton.jit
def search(
    target, peak, around, factors, starts, passes, smallest, largest,
    WARM: tl.constexpr, BORDERS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """``absmax.search_absmax`` of a tile whose rows are blocks, from ``starts`` factors."""
    usual = tl.full(peak.shape, -1.0 / LEVELS[0], tl.float32)
    scaled = target * tl.div_rn(1.0, tl.maximum(peak, smallest))[:, None]
    base = usual
    if WARM:
        base = tl.div_rn(around, tl.where(peak > 0, peak, 1.0))
        share = tl.abs(base) * -LEVELS[0]
        base = tl.where((share > NEAREST) & (share < FARTHEST), base, usual)
    best = tl.zeros_like(peak)
    most = tl.zeros_like(peak)
    for turn in range(starts + passes - 1):
        at = best
        if turn < starts:
            at = possible_share(base * tl.load(factors + turn), peak, largest, BORDERS)
        scale = tl.div_rn(1.0, tl.where(tl.abs(at) > 0, at, usual))
        level = nearest(scaled * scale[:, None], BORDERS, LEVELS)
        along = tl.sum(level * scaled, axis=1)
        square = tl.sum(level * level, axis=1)
        some = tl.abs(along) > 0
        at = tl.where(some, tl.div_rn(along, tl.where(some, square, 1.0)), 0.0)
        if len(BORDERS) > 0:
            gain = along * at
        else:
            at = possible_share(at, peak, largest, BORDERS)
            gain = at * (2.0 * along - at * square)
        better = gain > most
        best = tl.where(better, at, best)
        most = tl.where(better, gain, most)
    found = best * peak
    if len(BORDERS) > 0:
        usable = (tl.abs(found) >= smallest) & (tl.abs(found) <= largest)
        found = tl.where(usable, found, peak)
    else:
        found = possible_scale(found, largest)
    return found


@triton.jit
def tile(values, BLOCKS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Where this program's values begin, where each lies from there, and which of them there are.

    Only the beginning may need 64 bits.
    """
    begin = tl.program_id(0).to(tl.int64) * (BLOCKS * SIZE)
    count = tl.minimum(values - begin, BLOCKS * SIZE).to(tl.int32)
    column = tl.arange(0, WIDTH)[None, :]
    place = tl.arange(0, BLOCKS)[:, None] * SIZE + column
    inside = place < count
    if WIDTH > SIZE:
        inside = inside & (column < SIZE)
    return begin, place, inside, count


@triton.jit
def aimed(
    W, product, memory, of_memory, of_product, place, inside,
    CARRIED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """W − product, or with ``AHEAD`` W − (of_memory · memory + of_product · product)."""
    target = read(W + place, inside)
    if CARRIED:
        carried = read(product + place, inside)
        if AHEAD:
            carried = of_memory * read(memory + place, inside) + of_product * carried
        target = target - carried
    return target


@triton.jit
def write_pairs(packed, code, place, inside):
    """Two a byte, the first in the high nibble. Beside an odd last one is the code of a zero."""
    pairs: tl.constexpr = (code.shape[0], code.shape[1] // 2, 2)
    high, low = tl.split(tl.reshape(code, pairs))
    first, _ = tl.split(tl.reshape(place, pairs))
    there, _ = tl.split(tl.reshape(inside.to(tl.int32), pairs))
    tl.store(packed + first // 2, ((high << 4) | low).to(tl.uint8), mask=there > 0)


@triton.jit
def step(
    W, product, memory, later, of_memory, of_product, kept_memory, kept_product,
    around, factors, starts, passes, smallest, largest,
    scales, codes, residual, energies, blocks, values,
    FROM: tl.constexpr, WARM: tl.constexpr, CARRIED: tl.constexpr, AHEAD: tl.constexpr,
    ENCODE: tl.constexpr,
    BORDERS: tl.constexpr, LEVELS: tl.constexpr, CODES: tl.constexpr, SHARE: tl.constexpr,
    ROUNDING: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Scales of W − product, and with ``ENCODE`` its codes, W − Q and each program's ‖W − Q‖².

    ``FROM`` says whether scales are "given", the format's own ("plain") or "searched" for.
    ``SHARE`` is the scale of a block of integers whose largest magnitude is 1, without a search.
    With ``AHEAD`` the target is that of ``extrapolation.py``, whose M goes from ``memory`` to
    ``later``.
    """
    # Interpreted, they are float64.
    smallest = tl.full((), smallest, tl.float32)
    of_memory, of_product = tl.full((), of_memory, tl.float32), tl.full((), of_product, tl.float32)
    begin, place, inside, count = tile(values, BLOCKS, SIZE, WIDTH)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    there = block < blocks
    ragged = (tl.arange(0, BLOCKS) + 1) * SIZE > count
    W += begin
    if CARRIED:
        product += begin
    if AHEAD:
        memory += begin
    target = aimed(W, product, memory, of_memory, of_product, place, inside, CARRIED, AHEAD)
    peak = tl.max(tl.abs(target), axis=1)
    if FROM == "given":
        scale = tl.load(scales + block, mask=there, other=0.0)
    elif FROM == "searched":
        previous = peak
        if WARM:
            previous = tl.load(around + block, mask=there, other=0.0)
        scale = search(
            target, peak, previous, factors, starts, passes, smallest, largest,
            WARM, BORDERS, LEVELS,
        )  # fmt: skip
    elif len(BORDERS) > 0:
        # A ragged block's is stored as it is used.
        scale = tl.where(ragged, tl.maximum(peak, smallest), peak)
    else:
        scale = possible_scale(peak * SHARE, largest)
    if FROM != "given":
        tl.store(scales + block, scale, mask=there)
    if ENCODE:
        # Read again: to keep it through the search costs more than half of all registers.
        target = aimed(W, product, memory, of_memory, of_product, place, inside, CARRIED, AHEAD)
        if len(BORDERS) > 0:
            reciprocal = tl.div_rn(1.0, tl.maximum(tl.abs(scale), smallest))
            value = target * tl.where(scale < 0, -reciprocal, reciprocal)[:, None]
            if FROM == "plain":
                # A ragged block is divided.
                divisor = tl.maximum(peak, smallest)[:, None]
                value = tl.where(ragged[:, None], tl.div_rn(target, divisor), value)
            level = nearest(value, BORDERS, LEVELS)
            code = choice(value, BORDERS, CODES, tl.int32)
            write_pairs(codes + begin // 2, code, place, inside)
        else:
            reciprocal = tl.div_rn(1.0, tl.where(scale == 0, 1.0, scale))
            reciprocal = tl.where(scale == 0, 0.0, reciprocal)
            level = nearest(target * reciprocal[:, None], BORDERS, LEVELS)
            tl.store(codes + begin + place, level.to(tl.int8), mask=inside)
        rest = read(W + place, inside) - to_runtime(level * scale[:, None], ROUNDING)
        tl.store(residual + begin + place, rest, mask=inside)
        write_energy(energies, rest, inside)
        if AHEAD:
            kept_memory = tl.full((), kept_memory, tl.float32)
            kept_product = tl.full((), kept_product, tl.float32)
            kept = kept_memory * read(memory + place, inside)
            kept = kept + kept_product * read(product + place, inside)
            tl.store(later + begin + place, kept, mask=inside)


@triton.jit
def leave(
    W, product, codes, scales, table, residual, energies, blocks, values,
    CARRIED: tl.constexpr, KEEP: tl.constexpr, PACKED: tl.constexpr,
    ROUNDING: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Each program's ‖W − Q − product‖², and with ``KEEP`` that matrix, from codes and scales.

    ``table`` holds the level of each of sixteen ``PACKED`` codes. Others are their own.
    """
    begin, place, inside, _ = tile(values, BLOCKS, SIZE, WIDTH)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    scale = tl.load(scales + block, mask=block < blocks, other=0.0)
    if PACKED:
        pair = tl.load(codes + begin // 2 + place // 2, mask=inside, other=0).to(tl.int32)
        level = tl.load(table + tl.where(place % 2 == 0, pair >> 4, pair & 15))
    else:
        level = tl.load(codes + begin + place, mask=inside, other=0).to(tl.float32)
    rest = read(W + begin + place, inside) - to_runtime(level * scale[:, None], ROUNDING)
    if CARRIED:
        rest = rest - read(product + begin + place, inside)
    if KEEP:
        tl.store(residual + begin + place, rest, mask=inside)
    write_energy(energies, rest, inside)


@triton.jit
def write_energy(energies, rest, inside):
    """In float64, which squares of float32 do not outgrow."""
    wide = tl.where(inside, rest, 0.0).to(tl.float64)
    tl.store(energies + tl.program_id(0), tl.sum(tl.sum(wide * wide, axis=1), axis=0))
