"""The levels that stored codes stand for, and what a block's scale may be.

bitsandbytes: a 4-bit code is an index into sixteen levels between -1 and 1; a value is its level
times the absmax of its block. Its kernels choose the table by name and ignore the one stored
beside the codes, so these sixteen numbers are the format: no others can be loaded.

Integer formats: a code is its own level, from -2^(bits - 1) to 2^(bits - 1) - 1, and a value is the
code times the scale of its block. Scales are stored in 16 bits, and not all are possible.

Both are searched for the same way (``absmax.py``, ``gptq.py``): what is called absmax there is the
scale, whatever the outermost level.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from loftq_cli.errors import InvalidSetting
from loftq_cli.formats import INTEGER_BITS

# NormalFloat: quantiles of N(0, 1), scaled so that the outermost are ±1, eight negative, seven
# positive and an exact zero (QLoRA, arXiv 2305.14314, appendix E). The quantiles are those of
# bitsandbytes' create_normal_map(offset=0.9677083), which QLoRA's authors fitted; the digits are
# the float32 values that every kernel of bitsandbytes carries.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# NormalFloat of two bits as LoftQ has it (arXiv 2310.08659): -1, 0, 0.3379 and 1.
NF2_CODES = (0, 7, 11, 15)
# Of the 1287 choices of eight that hold -1, 0 and 1 the one with the least squared error on normal
# values, in blocks of 64 with the absmax of least error: 0.02935 of their square over 40 000
# blocks. The next best leaves 5.2 % more.
NF3_CODES = (0, 1, 3, 5, 7, 10, 13, 15)

# A 4-bit float, one sign bit, two exponent bits (bias 2), one mantissa bit, divided by its largest
# value, 12. Listed by bit pattern 0b000 .. 0b111; the exponent is stored inverted, hence the order.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4_LEVELS = tuple(m / 12 for m in _FP4_MAGNITUDES) + tuple(0.0 - m / 12 for m in _FP4_MAGNITUDES)

# int8 codes run from -127 to 127; bitsandbytes dequantizes by multiplying with this reciprocal.
INT8_LARGEST = 127.0
INT8_RECIPROCAL = 7.874015718698502e-3


@dataclass(frozen=True)
class Codebook:
    """Sixteen levels by code, and the codes that a quantizer may choose, ascending by level.

    FP4 has two zeros, code 0 (+0) and code 8; a tie at zero goes to code 0, so ``order`` lists it
    first. A codebook of fewer bits has the same ``levels`` and a shorter ``order``: every runtime
    that reads four bits reads it.
    """

    levels: tuple[float, ...]
    order: tuple[int, ...]

    def level_tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """The levels by code, float32: what bitsandbytes stores as ``quant_map``."""
        return torch.tensor(self.levels, dtype=torch.float32, device=device)

    def order_tensor(self, device: torch.device | str = "cpu") -> Tensor:
        return torch.tensor(self.order, dtype=torch.uint8, device=device)

    def midpoints(self, device: torch.device | str = "cpu") -> Tensor:
        """The borders between neighbouring levels; a value on a border takes the lower level.

        Computed in float32: a border rounded differently would move the ties.
        """
        ascending = self.ascending("cpu")
        return ((ascending[:-1] + ascending[1:]) / 2).to(device)

    @property
    def outermost(self) -> float:
        """The magnitude of the lowest level, which is the largest of all."""
        return -self.levels[self.order[0]]

    def ascending(self, device: torch.device | str = "cpu") -> Tensor:
        """The levels that a quantizer may choose, float32, ascending."""
        return self.level_tensor(device)[self.order_tensor(device).int()]

    def nearest(self, values: Tensor) -> Tensor:
        """The levels nearest to values of blocks whose absmax is 1."""
        borders = self.midpoints(values.device)
        return self.ascending(values.device)[torch.bucketize(values, borders, out_int32=True)]


# The largest value of eight significant bits that float16 has, and so has bfloat16.
LARGEST_SCALE = 65280.0


@dataclass(frozen=True)
class IntegerGrid:
    """The integers of so many bits, two's complement. A value halfway between goes to the even."""

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in INTEGER_BITS:
            possible = ", ".join(map(str, INTEGER_BITS))
            raise InvalidSetting(f"integers of {self.bits} bits are not possible: only {possible}")

    @property
    def lowest(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def outermost(self) -> float:
        return float(-self.lowest)

    @property
    def plain_share(self) -> float:
        """The scale of a block whose largest magnitude is 1, without a search."""
        return 2.0 / (2**self.bits - 1)

    def ascending(self, device: torch.device | str = "cpu") -> Tensor:
        return torch.arange(self.lowest, self.highest + 1, dtype=torch.float32, device=device)

    def midpoints(self, device: torch.device | str = "cpu") -> Tensor:
        return self.ascending(device)[1:] - 0.5

    def nearest(self, values: Tensor) -> Tensor:
        """The integers, as float32, nearest to values of blocks whose scale is 1."""
        return values.round().clamp_(self.lowest, self.highest)

    def possible(self, scale: Tensor, largest: float) -> Tensor:
        """The nearest scale that both bfloat16 and float16 hold exactly, up to ``largest``.

        That is eight significant bits, and no finer than float16's 2^-24. ``largest`` must be such
        a value itself.
        """
        scale = scale.clamp(-largest, largest)
        # Below 2^-17 float16 alone is the coarser, above it bfloat16: no scale is rounded twice.
        eight_bits = torch.where(scale.abs() < 2**-17, scale, scale.bfloat16().float())
        return eight_bits.half().float()


Levels: TypeAlias = Codebook | IntegerGrid


# Which codes each number of bits may choose.
_ORDERS: dict[str, dict[int, tuple[int, ...]]] = {
    "nf4": {4: tuple(range(16)), 3: NF3_CODES, 2: NF2_CODES},
    "fp4": {4: (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)},
}
_LEVELS = {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS}


def codebook(quant_type: str, bits: int = 4) -> Codebook:
    """The codebook called ``quant_type``, with 2^bits of its levels to choose from.

    Stored are the container's 4-bit codes in any case: fewer bits are what a runtime with a
    container of its own for them would need, and what quantizing to them costs can be seen here.
    """
    if quant_type not in _ORDERS:
        names = ", ".join(_ORDERS)
        raise InvalidSetting(f"quantization type {quant_type!r} is not one of {names}")
    orders = _ORDERS[quant_type]
    if bits not in orders:
        possible = ", ".join(map(str, sorted(orders)))
        raise InvalidSetting(f"{quant_type} with {bits} bits is not possible: only {possible}")
    return Codebook(_LEVELS[quant_type], orders[bits])


@lru_cache(maxsize=1)
def _dynamic_map() -> Tensor:
    levels = [0.0, 1.0]
    for exponent in range(7):
        # 2^e equal intervals of [0.1, 1], their centres times 10^(e-6): the smaller the value,
        # the fewer bits are left for its fraction. float32 throughout, as in bitsandbytes.
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        centres = 10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        levels += centres.tolist() + (-centres).tolist()
    return torch.tensor(sorted(levels), dtype=torch.float32)


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """The 256 levels of the signed 8-bit dynamic type (arXiv 1511.04561), ascending.

    bitsandbytes stores a 4-bit weight's absmax in it when it double-quantizes, and the table
    itself beside them as ``nested_quant_map``. It runs from -0.9930 to 1: not symmetric.
    """
    return _dynamic_map().to(device, copy=True)
