"""Numbers as people read them. Sizes are decimal, as on the Hub and on disk labels: 1 MB = 10^6."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def size(count: int) -> str:
    """1234567 -> "1.23 MB"; bytes below 1000 are exact."""
    if count < 1000:
        return f"{count} B"
    value, unit = count / 1000, "kB"
    for larger in ("MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{significant(value)} {unit}"


def number(value: int) -> str:
    """1234567 -> "1,234,567"."""
    return f"{value:,}"


def plain(value: float) -> str:
    """4.0 -> "4", 2.5 -> "2.5", 3.128 -> "3.13"."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def percent(share: float) -> str:
    """0.0702 -> "7.02 %"."""
    return f"{significant(100 * share)} %"


def seconds(value: float) -> str:
    """0.0123 -> "12.3 ms", 41.24 -> "41.2 s", 754 -> "12 min 34 s"."""
    if value < 1:
        return f"{significant(1000 * value)} ms"
    if value < 120:
        return f"{significant(value)} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def shape(sizes: Sequence[int]) -> str:
    """(768, 2304) -> "768 × 2304"; a scalar's shape is "1"."""
    return " × ".join(map(str, sizes)) or "1"


def plural(count: int, noun: str) -> str:
    """(1, "layer") -> "1 layer", (1200, "layer") -> "1,200 layers"."""
    return f"{number(count)} {noun}" if count == 1 else f"{number(count)} {noun}s"


def removed(before: float, after: float) -> float:
    """Which share of an error is gone; negative if it grew. Of no error, none is."""
    return 1 - after / before if before else 0.0


def error_change(before: float, after: float) -> str:
    """(0.093, 0.0765) -> "9.30 % → 7.65 % with the adapter (17.7 % of it removed)"."""
    share = removed(before, after)
    change = f"{percent(share)} of it removed" if share >= 0 else f"{percent(-share)} more"
    return f"{percent(before)} → {percent(after)} with the adapter ({change})"


def significant(value: float) -> str:
    """Three significant digits and no exponent: 0.325, 7.02, 41.2, 812; 0 for what is no more."""
    magnitude = abs(value)
    if magnitude < 0.0005:
        return "0"
    digits = 3 if magnitude < 0.9995 else 2 if magnitude < 9.995 else 1 if magnitude < 99.95 else 0
    return f"{value:.{digits}f}"


def small(value: float) -> str:
    """Three significant digits of a number that may need an exponent: "0.00338", "2.10e-05"."""
    return f"{value:.2e}" if 0 < abs(value) < 1e-4 else f"{value:.3g}"


def listed(choices: Iterable[object], word: str = "and") -> str:
    """`2, 3, 4 and 8`."""
    *first, last = map(str, choices)
    return f"{', '.join(first)} {word} {last}" if first else last
