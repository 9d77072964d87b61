"""Pictures of a few characters: a curve in a table's cell, a share as a bar.

Where there is no Unicode, `text.py` puts `SPARKS_ASCII` in their place.
"""

from __future__ import annotations

from collections.abc import Sequence

_LEVELS = "▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉"
SPARKS_ASCII = dict(zip(_LEVELS + _EIGHTHS[1:], "_.:-=+*#   ####", strict=True))
_WIDTH = 10


def curve(values: Sequence[float]) -> str:
    """The values from left to right, the largest a full block; as many as there is room for."""
    if len(values) < 2:
        return ""
    steps = min(len(values), _WIDTH)
    picked = [values[round(i * (len(values) - 1) / (steps - 1))] for i in range(steps)]
    low, high = min(picked), max(picked)
    scale = (len(_LEVELS) - 1) / (high - low) if high > low else 0.0
    return "".join(_LEVELS[round((value - low) * scale)] for value in picked)


def bar(share: float) -> str:
    """A part of one, of up to ten characters, to an eighth of one."""
    eighths = round(8 * _WIDTH * min(max(share, 0.0), 1.0))
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()
