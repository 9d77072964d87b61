"""Which SVD a matrix gets, and what its sketches take: arithmetic for plans too, so no torch."""

from typing import get_args

from loftq_cli.errors import InvalidSetting
from loftq_cli.formats import SvdMethod

# Values in a piece of rows: with what belongs to it, a share of the last cache.
PIECE = 1 << 20
# Columns of a residual that are multiplied at a time.
COLUMNS = 256


def takes_exact(shape: tuple[int, int], rank: int, method: str) -> bool:
    """Whether the whole SVD is wanted, or cheaper, or all that is left for so high a rank."""
    if method not in get_args(SvdMethod):
        methods = ", ".join(get_args(SvdMethod))
        raise InvalidSetting(f"SVD method {method!r} is not one of {methods}")
    smaller, width = min(shape), sketch_width(rank)
    cheaper = smaller <= max(2 * width, 64)
    return method == "exact" or width >= smaller or (method == "auto" and cheaper)


def sketch_width(rank: int) -> int:
    """Vectors in a sketch: at least eight more than the rank, in whole registers."""
    return (rank + 8 + 15) // 16 * 16
