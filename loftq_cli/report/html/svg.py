"""Pictures as inline SVG, each as wide as a phone: bars, stacked bars, lines, a heat map.

Colours are classes that `style.css` fills in for light, dark and paper. Series differ in dash and
marker too, and a heat map in lightness alone, so that all of it can be read in grey.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from loftq_cli.report.escape import visible

WIDTH = 340
_ROW = 22  # of bars
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 34  # around a plot
_LABEL = 118  # beside bars
_FIGURES = 62  # behind them
COLOURS = 6
_MARKERS = ("circle", "square", "triangle")

Show = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """A line through points (x, y) in ascending x; without ``joined`` the points alone."""

    name: str
    points: Sequence[tuple[float, float]]
    joined: bool = True


@dataclass(frozen=True)
class Axis:
    """What an axis says, and how; a logarithmic one has values above 0 only.

    It is marked at ``ticks``, or where its numbers are round.
    """

    label: str
    show: Show
    log: bool = False
    ticks: Sequence[float] = ()


def text(value: str) -> str:
    """Any text as text of HTML or SVG, or inside an attribute's quotes."""
    return escape(visible(value))


def picture(title: str, body: Iterable[str], height: float) -> str:
    """An image whose ``title`` says what there is to see."""
    name = text(title)
    return (
        f'<svg role="img" aria-label="{name}" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" '
        f'height="{height:g}"><title>{name}</title>{"".join(body)}</svg>'
    )


def bars(title: str, rows: Sequence[tuple[str, float, str]], marked: str | None = None) -> str:
    """A bar for every (label, value, value in words); the ``marked`` label stands out."""
    most = max((value for _, value, _ in rows), default=0) or 1
    room = WIDTH - _LABEL - _FIGURES
    body = []
    for number, (label, value, words) in enumerate(rows):
        y = number * _ROW
        kind = "marked" if label == marked else "c0"
        body += [
            _label(_LABEL - 6, y + 15, label, "end", _LABEL),
            (
                f'<rect class="fill {kind}" x="{_LABEL}" y="{y + 4}" height="{_ROW - 8}" '
                f'width="{max(room * value / most, 1):.1f}"/>'
            ),
            _label(_LABEL + room * value / most + 5, y + 15, words, "start", _FIGURES + room),
        ]
    return picture(title, body, _ROW * len(rows))


def stacked(
    title: str,
    parts: Sequence[str],
    rows: Sequence[tuple[str, Sequence[float]]],
    show: Show,
    limit: tuple[float, str] | None = None,
) -> str:
    """A bar of ``parts`` for every row, with its sum; a line where the ``limit`` is."""
    sums = [sum(values) for _, values in rows]
    most = max([*sums, limit[0] if limit else 0]) or 1
    room = WIDTH - _LABEL - _FIGURES
    body, y = [], 0.0
    for (label, values), whole in zip(rows, sums, strict=True):
        x = float(_LABEL)
        body.append(_label(_LABEL - 6, y + 15, label, "end", _LABEL))
        for number, (part, value) in enumerate(zip(parts, values, strict=True)):
            width = room * value / most
            body.append(
                f'<rect class="fill c{number % COLOURS}" x="{x:.1f}" y="{y + 4}" '
                f'width="{width:.1f}" height="{_ROW - 8}">'
                f"<title>{text(f'{label}, {part}: {show(value)}')}</title></rect>"
            )
            x += width
        body.append(_label(x + 5, y + 15, show(whole), "start", _FIGURES))
        y += _ROW
    if limit is not None:
        x = _LABEL + room * limit[0] / most
        body += [
            f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{y}"/>',
            _label(x, y + 12, limit[1], "end" if x > WIDTH / 2 else "start", WIDTH),
        ]
        y += 16
    legend, height = _legend([(part, "fill") for part in parts], y + 6)
    return picture(title, [*body, *legend], height)


def lines(
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    mark: tuple[float, float, str] | None = None,
) -> str:
    """Lines over two axes, with a ``mark`` (x, y, what it says)."""
    points = [point for each in series for point in each.points]
    if not points:
        return ""
    height = 190
    across = _Scale([px for px, _ in points], _LEFT, WIDTH - _RIGHT, x)
    down = _Scale([py for _, py in points], height - _BOTTOM, _TOP, y)
    body = []
    for value, place in down.ticks():
        body += [
            (
                f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{place:.1f}" '
                f'y2="{place:.1f}"/>'
            ),
            _label(_LEFT - 6, place + 4, y.show(value), "end", _LEFT),
        ]
    for value, place in across.ticks():
        body.append(_label(place, height - _BOTTOM + 15, x.show(value), "middle", 60))
    body.append(_label(WIDTH - _RIGHT, height - 4, x.label, "end", WIDTH - _LEFT))
    body.append(_label(0, height - 4, y.label, "start", WIDTH))
    for number, each in enumerate(series):
        placed = [(across(px), down(py)) for px, py in each.points]
        if each.joined and len(placed) > 1:
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py in placed)
            body.append(
                f'<polyline class="line c{number % COLOURS} d{number % 3}" points="{path}">'
                f"<title>{text(each.name)}</title></polyline>"
            )
        if not each.joined or len(placed) < 12:
            body += [_marker(px, py, number, each.name) for px, py in placed]
    if mark is not None:
        px, py = across(mark[0]), down(mark[1])
        side = "end" if px > WIDTH / 2 else "start"
        body += [
            f'<circle class="ring" cx="{px:.1f}" cy="{py:.1f}" r="7"/>',
            _label(px + (-11 if side == "end" else 11), py - 8, mark[2], side, WIDTH),
        ]
    named = [(each.name, "line" if each.joined else "point") for each in series]
    legend, height_now = _legend(named, height + 4) if len(series) > 1 else ([], height)
    return picture(title, [*body, *legend], height_now)


def heat(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: dict[tuple[str, str], float],
    show: Show,
) -> str:
    """A cell for every (row, column) that has a value; the more, the darker."""
    low, high = min(values.values()), max(values.values())
    room = WIDTH - _LABEL
    width, body = room / len(columns), []
    for i, row in enumerate(rows):
        body.append(_label(_LABEL - 6, i * 20 + 14, row, "end", _LABEL))
        for j, column in enumerate(columns):
            value = values.get((row, column))
            if value is None:
                continue
            share = (value - low) / (high - low) if high > low else 0.5
            body.append(
                f'<rect class="heat" fill-opacity="{0.12 + 0.88 * share:.2f}" '
                f'x="{_LABEL + j * width:.2f}" y="{i * 20}" height="19" '
                f'width="{max(width - (1 if width > 4 else 0), 0.5):.2f}">'
                f"<title>{text(f'{row}, {column}: {show(value)}')}</title></rect>"
            )
    y = len(rows) * 20 + 14
    step = max(1, math.ceil(len(columns) / 8))
    body += [
        _label(_LABEL + (j + 0.5) * width, y, columns[j], "middle", 60)
        for j in range(0, len(columns), step)
    ]
    body += [
        f'<rect class="heat" fill-opacity="{0.12 + 0.88 * k / 15:.2f}" y="{y + 10}" '
        f'x="{_LABEL + k * room / 32:.1f}" width="{room / 32:.1f}" height="8"/>'
        for k in range(16)
    ]
    body += [
        _label(_LABEL - 6, y + 18, show(low), "end", _LABEL),
        _label(_LABEL + room / 2 + 6, y + 18, show(high), "start", _LABEL),
    ]
    return picture(title, body, y + 24)


class _Scale:
    """From values to places between two ends."""

    def __init__(self, values: Sequence[float], start: float, end: float, axis: Axis) -> None:
        self.start, self.end, self.log, self.marked = start, end, axis.log, axis.ticks
        low, high = self._of(min(values)), self._of(max(values))
        margin = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
        self.low, self.high = low - margin, high + margin

    def _of(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        share = (self._of(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[tuple[float, float]]:
        """Values to mark, about four of them unless they are given, and their places."""
        found = list(self.marked) or (self._powers() if self.log else self._steps())
        if not self.marked and len(found) > 5:
            found = found[:: math.ceil(len(found) / 5)]
        return [(value, self(value)) for value in found]

    def _powers(self) -> list[float]:
        span = range(math.floor(self.low), math.ceil(self.high) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10))):
            found = [digit * 10.0**power for power in span for digit in digits]
            found = [each for each in found if self.low <= math.log10(each) <= self.high]
            if len(found) > 2:
                break
        return found

    def _steps(self) -> list[float]:
        rough = (self.high - self.low) / 4
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(each * size for each in (1, 2, 2.5, 5, 10) if each * size >= rough)
        first = math.ceil(self.low / step)
        return [k * step for k in range(first, math.floor(self.high / step) + 1)]


def _label(x: float, y: float, value: str, anchor: str, room: float) -> str:
    """Text that is cut where there is no room for it; all of it is shown on being pointed at."""
    most = max(3, int(room / 6.1))
    cut = value if len(value) <= most else f"…{value[1 - most :]}"
    more = "" if cut == value else f"<title>{text(value)}</title>"
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text(cut)}{more}</text>'


def _marker(x: float, y: float, number: int, name: str) -> str:
    kind, shape = f'class="point c{number % COLOURS}"', _MARKERS[number // 2 % len(_MARKERS)]
    tip = f"<title>{text(name)}</title>"
    if shape == "circle":
        return f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}" r="3">{tip}</circle>'
    if shape == "square":
        return f'<rect {kind} x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6">{tip}</rect>'
    path = f"{x:.1f},{y - 4:.1f} {x + 4:.1f},{y + 3:.1f} {x - 4:.1f},{y + 3:.1f}"
    return f'<polygon {kind} points="{path}">{tip}</polygon>'


def _legend(names: Sequence[tuple[str, str]], y: float) -> tuple[list[str], float]:
    """What each colour is, in as many lines as it takes, and where the picture ends then."""
    x, found = 4.0, []
    for number, (name, kind) in enumerate(names):
        width = 24 + 6.1 * len(name)
        if x > 4 and x + width > WIDTH:
            x, y = 4.0, y + 16
        colour = f"c{number % COLOURS}"
        if kind == "fill":
            found.append(
                f'<rect class="fill {colour}" x="{x:.1f}" y="{y + 3}" width="12" height="10"/>'
            )
        else:
            if kind == "line":
                found.append(
                    f'<line class="line {colour} d{number % 3}" x1="{x:.1f}" x2="{x + 14:.1f}" '
                    f'y1="{y + 8}" y2="{y + 8}"/>'
                )
            found.append(_marker(x + 7, y + 8, number, name))
        found.append(_label(x + 18, y + 12, name, "start", WIDTH))
        x += width
    return found, y + 20
