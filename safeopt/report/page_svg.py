"""Small figures as inline SVG: colours are CSS classes, so that they follow the page's theme.

Each function returns what follows `<svg `: the page puts its label before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from safeopt.report.page_blocks import plain

# Narrow, so that the text is still readable where a phone shows the whole width.
WIDTH = 400
LEFT, RIGHT, TOP = 46, 12, 10
COLOURS = 7  # classes c0 to c6
LETTER = 6.9  # mean width of a letter
CELL, ROW = 40, 20

Points = Sequence[tuple[float, float]]


def heatmap(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]]) -> str:
    """Cells of numbers >= 0, shaded up to the largest one; NaN leaves a cell empty.

    Up to 40 rows the numbers stand in the cells.
    """
    top = max((v for row in values for v in row if v == v), default=0.0) or 1.0
    few = len(rows) <= 40
    high = ROW if few else 6
    width = max(LEFT + CELL * len(columns) + RIGHT, 200)
    parts = []
    for j, name in enumerate(columns):
        parts.append(_text(LEFT + CELL * (j + 0.5), 22, name, "middle"))
    for i, name in enumerate(rows):
        y = 30 + high * i
        if few or i % 8 == 0:
            parts.append(_text(LEFT - 8, y + high / 2 + 4, name, "end"))
        for j, value in enumerate(values[i]):
            x = LEFT + CELL * j
            if value != value:
                parts.append(_rect(x, y, CELL - 1, high - (1 if few else 0), "none"))
                continue
            share = value / top
            opacity = f' fill-opacity="{0.04 + 0.96 * share:.3f}"'
            parts.append(_rect(x, y, CELL - 1, high - (1 if few else 0), "heat", opacity))
            if few:
                kind = "over" if share > 0.55 else "cell"
                parts.append(_text(x + CELL / 2 - 0.5, y + 14, _short(value), "middle", kind))
    return _svg(width, 34 + high * len(rows), parts)


def lines(
    series: Mapping[str, Points],
    xlabel: str,
    ylabel: str,
    *,
    ylim: tuple[float, float] | None = None,
    xlim: tuple[float, float] | None = None,
    marks: Sequence[str] = (),
    at: tuple[float, str] | None = None,
) -> str:
    """Lines of (x, y), at most seven colours; each point is marked where there are few.

    Args:
        series: name -> points.
        xlabel: below the x axis, with the unit.
        ylabel: above the y axis, likewise.
        ylim: the range of y; that of the data when None.
        xlim: the range of x, likewise.
        marks: series whose last point gets a ring.
        at: a vertical line at this x, and its name.
    """
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    names = [*series, *([at[1]] if at else [])] if len(series) > 1 or at else []
    legend, down = _legend(names, len(series))
    x0, x1, xticks = _axis(*(xlim or (min(xs), max(xs))))
    y0, y1, yticks = _axis(*(ylim or (min(ys), max(ys))))
    top, bottom = TOP + down + 22, TOP + down + 22 + 190

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return across, bottom - (y - y0) / (y1 - y0) * (bottom - top)

    parts = [*legend, _text(2, top - 10, _clip(ylabel, 56), "start")]
    for tick in yticks:
        _, y = place(x0, tick)
        parts.append(_line(LEFT, y, WIDTH - RIGHT, y, "rule"))
        parts.append(_text(LEFT - 8, y + 4, f"{tick:g}", "end"))
    for tick in xticks:
        x, _ = place(tick, y0)
        parts.append(_text(x, bottom + 17, f"{tick:g}", "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, bottom + 36, xlabel, "middle"))
    if at:
        x, _ = place(at[0], y0)
        parts.append(_line(x, top, x, bottom, "at"))
    for i, (name, points) in enumerate(series.items()):
        placed = [place(x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        dash = ' stroke-dasharray="5 3"' if i >= COLOURS else ""
        parts.append(f'<polyline class="curve c{i % COLOURS}" points="{path}"{dash}/>')
        if len(placed) <= 30:
            parts += [_marker(i, x, y) for x, y in placed]
        if name in marks:
            x, y = placed[-1]
            parts.append(f'<circle class="ring c{i % COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="7"/>')
    return _svg(WIDTH, bottom + 44, parts)


def bars(
    rows: Sequence[tuple[str, str, float, tuple[float, float] | None, int]], top: float
) -> str:
    """Horizontal bars from 0 to `top`: (name, value in words, value, its interval, colour)."""
    left, right = 10, 10
    scale = (WIDTH - left - right) / (top or 1.0)
    parts, y = [], 4.0
    for name, words, value, interval, colour in rows:
        parts.append(_text(left, y + 12, _clip(name, 44), "start", "strong"))
        parts.append(_text(WIDTH - right, y + 12, words, "end"))
        parts.append(_rect(left, y + 18, WIDTH - left - right, 12, "track"))
        parts.append(_rect(left, y + 18, value * scale, 12, f"bar c{colour}"))
        if interval:
            low, high = (left + end * scale for end in interval)
            parts.append(_line(low, y + 24, high, y + 24, "whisker"))
            parts += [_line(x, y + 20, x, y + 28, "whisker") for x in (low, high)]
        y += 40
    return _svg(WIDTH, y, parts)


def thinned(values: Sequence[float], most: int = 150) -> tuple[list[tuple[float, float]], int]:
    """(step, value) of steps counted from 1, as means over so many steps that `most` points do."""
    size = -(-len(values) // most)
    points = []
    for start in range(0, len(values), size):
        chunk = values[start : start + size]
        points.append((start + (len(chunk) + 1) / 2, math.fsum(chunk) / len(chunk)))
    return points, size


def _axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """A range with round ends that holds both, and its ticks."""
    if not high > low:
        low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [round(k * step, 12) for k in range(first, last + 1)]
    return ticks[0], ticks[-1], ticks


def _legend(names: Sequence[str], series: int) -> tuple[list[str], float]:
    parts: list[str] = []
    x, y = float(LEFT), TOP + 8.0
    for i, name in enumerate(_clip(name, 46) for name in names):
        width = 30 + LETTER * len(name)
        if x + width > WIDTH and x > LEFT:
            x, y = float(LEFT), y + 18
        colour = f"curve c{i % COLOURS}" if i < series else "at"
        parts += [_line(x, y - 4, x + 16, y - 4, colour), _text(x + 21, y, name, "start")]
        if i < series:
            parts.append(_marker(i, x + 8, y - 4))
        x += width + 8
    return parts, y - TOP + 8 if names else 0.0


def _marker(i: int, x: float, y: float) -> str:
    """Shapes tell lines apart where colours do not."""
    r = 3.4
    shapes = (
        f"M{x - r:.1f},{y:.1f}a{r},{r} 0 1,0 {2 * r},0a{r},{r} 0 1,0 {-2 * r},0z",
        f"M{x - 3:.1f},{y - 3:.1f}h6v6h-6z",
        f"M{x:.1f},{y - 4:.1f}l4,7.2h-8z",
        f"M{x:.1f},{y - 4.4:.1f}l4.4,4.4l-4.4,4.4l-4.4,-4.4z",
    )
    return f'<path class="dot c{i % COLOURS}" d="{shapes[i % len(shapes)]}"/>'


def _clip(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _short(value: float) -> str:
    if value == 0 or value >= 0.005:
        return f"{value:.2g}" if value < 10 else f"{value:.0f}"
    return "<.01"


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    least = 0.75 * width if width > WIDTH else 0
    size = f"max-width:{1.25 * width:.0f}px;min-width:{least:.0f}px"
    return f'viewBox="0 0 {width:g} {height:g}" style="{size}">{"".join(parts)}'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "label") -> str:
    at = f'class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {at}>{escape(plain(text))}</text>"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _rect(x: float, y: float, width: float, height: float, kind: str, more: str = "") -> str:
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}"'
        f' height="{height:.1f}"{more}/>'
    )
