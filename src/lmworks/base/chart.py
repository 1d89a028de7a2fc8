"""A line chart as inline SVG: axes with round ticks, one colour a series, readable in light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 320, 60, 130, 14, 44
COLORS = ("var(--s0)", "var(--s1)", "var(--s2)", "var(--s3)")


@dataclass(frozen=True)
class Chart:
    """Lines over a common x axis: each series is (name, [(x, y), …])."""

    title: str
    x_label: str
    y_label: str
    series: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]
    dots: bool = False  # points that no line joins

    def to_svg(self) -> str:
        """Return the chart as an `<svg>` element; points that are not finite are left out."""
        lines = [(name, [p for p in points if all(map(math.isfinite, p))]) for name, points in self.series]
        points = [p for _, line in lines for p in line]
        if not points:
            return '<svg viewBox="0 0 1 1" role="img" aria-label="no data"></svg>'
        xs, ys = ticks([x for x, _ in points]), ticks([y for _, y in points])

        def place(x: float, y: float) -> tuple[float, float]:
            right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
            return (
                LEFT + (x - xs[0]) / (xs[-1] - xs[0]) * (right - LEFT),
                bottom - (y - ys[0]) / (ys[-1] - ys[0]) * (bottom - TOP),
            )

        parts = [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.title)}" '
            'font-family="system-ui, sans-serif" font-size="12" fill="var(--quiet)">'
        ]
        for y in ys:
            left, top = place(xs[0], y)
            parts.append(f'<path d="M{left:.1f} {top:.1f}H{WIDTH - RIGHT}" stroke="var(--line)"/>')
            parts.append(f'<text x="{left - 8:.1f}" y="{top + 4:.1f}" text-anchor="end">{label(y)}</text>')
        for x in xs:
            left, top = place(x, ys[0])
            parts.append(f'<text x="{left:.1f}" y="{top + 18:.1f}" text-anchor="middle">{label(x)}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(self.x_label)}</text>')
        parts.append(
            f'<text transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
            f"{escape(self.y_label)}</text>"
        )
        for i, (name, line) in enumerate(lines):
            if not line:
                continue
            color = COLORS[i % len(COLORS)]
            dash = ' stroke-dasharray="6 4"' if i >= len(COLORS) else ""  # the colours begin again
            path = "L".join("{:.1f} {:.1f}".format(*place(x, y)) for x, y in line)
            if self.dots:
                spots = (place(x, y) for x, y in line)
                parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>' for x, y in spots]
            else:
                parts.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="2"{dash}/>')
            parts.append(
                f'<path d="M{WIDTH - RIGHT + 14} {TOP + 10 + 20 * i}h16" stroke="{color}" stroke-width="3"{dash}/>'
                f'<text x="{WIDTH - RIGHT + 36}" y="{TOP + 14 + 20 * i}">{escape(name)}</text>'
            )
        return "".join(parts) + "</svg>"


def ticks(values: Sequence[float], *, about: int = 5) -> list[float]:
    """Return round numbers that enclose the values: [0.3, 9.1] -> [0, 2, 4, 6, 8, 10]."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, last + 1)]


def label(value: float) -> str:
    """Print a tick: 12000 -> 12k, 0.25 -> 0.25."""
    return f"{value / 1000:g}k" if abs(value) >= 10000 else f"{value:g}" if abs(value) > 1e-12 else "0"
