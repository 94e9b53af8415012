"""The figures as SVG, each as wide as a phone, drawn by hand so that the page needs nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from keepkv.eval.report.figures import Bars, Curves, Figure, Heat
from keepkv.render import color

WIDTH, LEFT, RIGHT, TOP = 340, 44, 12, 24
COLOURS = 8  # of the page: --c0 to --c7


def order(names: Sequence[str]) -> dict[str, int]:
    """A colour for every name, the same in all figures: 0 for the full cache, 1 for keepkv, then by name."""
    ranked = sorted({*names, "full"}, key=lambda name: (name != "full", name.split(",")[0] != "keepkv", name))
    return {name: i and 1 + (i - 1) % (COLOURS - 1) for i, name in enumerate(ranked) if name in names}


def draw(figure: Figure) -> str:
    """The SVG element of a figure."""
    if isinstance(figure, Curves):
        return _curves(figure)
    return _bars(figure) if isinstance(figure, Bars) else _heat(figure)


def _curves(figure: Curves) -> str:
    points = [point for series in figure.series.values() for point in series]
    if not points:
        return ""
    low, high = (pick(math.log10(point.x) for point in points) for pick in (min, max))
    low, high = (low - 0.1, high + 0.1) if high - low < 0.05 else (low - 0.05 * (high - low), high + 0.05 * (high - low))
    top, bottom = (1.0 if figure.percent else max(point.high for point in points)) or 1.0, 210

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(value) - low) / (high - low)

    def y(value: float) -> float:
        return bottom - (bottom - TOP) * min(value / top, 1.0)

    parts = []
    for part in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(part * top):.1f}" y2="{y(part * top):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(part * top) + 4:.1f}" text-anchor="end">{part * top:.3g}</text>')
    last = -100.0
    for value in sorted({point.x for point in points}):
        if x(value) - last > 44:
            last = x(value)
            name = f"{value:.0%}" if figure.percent and value >= 0.1 else f"{value:.1%}" if figure.percent else f"{value:,.0f}"
            parts.append(f'<text x="{last:.1f}" y="{bottom + 16}" text-anchor="middle">{name}</text>')
    colours, marks = order(list(figure.series)), len(figure.series)
    for nth, (name, series) in enumerate(figure.series.items()):
        shift = 4.0 * (nth - (marks - 1) / 2) if marks > 1 else 0.0  # so that intervals do not cover each other
        ink = f"c{colours[name]}"
        line = " ".join(f"{x(p.x) + shift:.1f},{y(p.y):.1f}" for p in series)
        parts.append(f'<polyline class="line {ink}" points="{line}"/>')
        for p in series:
            at = f"{x(p.x) + shift:.1f}"
            parts.append(
                f'<g class="{ink}"><title>{escape(p.name)}: {p.y:.3g} [{p.low:.3g}, {p.high:.3g}]</title>'
                f'<line x1="{at}" x2="{at}" y1="{y(p.low):.1f}" y2="{y(p.high):.1f}"/>'
                f'<circle cx="{at}" cy="{y(p.y):.1f}" r="4"/></g>'
            )
    parts.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{bottom + 34}" text-anchor="middle">{escape(figure.x)}</text>')
    parts.append(f'<text x="0" y="10" class="axis">{escape(figure.y)}</text>')
    return _svg(figure.title, bottom + 40, parts) + key(list(figure.series))


def _bars(figure: Bars) -> str:
    names = list(dict.fromkeys(name for group in figure.groups.values() for name in group))
    colours, parts, at = order(names), [], 0.0
    for task, group in figure.groups.items():
        parts.append(f'<text x="0" y="{at + 14:.0f}" class="axis">{escape(task)}</text>')
        at += 20
        for name in sorted(group, key=lambda name: colours[name]):
            found, room = group[name], WIDTH - 60
            ends = f'x1="{room * found.low:.1f}" x2="{room * found.high:.1f}" y1="{at + 5.5}" y2="{at + 5.5}"'
            parts.append(
                f'<g class="c{colours[name]}"><title>{escape(f"{name}: {found}")}</title>'
                f'<rect x="0" y="{at:.0f}" width="{max(1.0, room * found.value):.1f}" height="11"/>'
                f'<line class="whisker" {ends}/></g>'
                f'<text x="{WIDTH}" y="{at + 10:.0f}" text-anchor="end">{found.value:.2f}</text>'
            )
            at += 14
        at += 6
    return _svg(figure.title, round(at), parts) + key(names)


def _heat(figure: Heat) -> str:
    left, cell = 62, min(90.0, (WIDTH - 62) / max(1, len(figure.columns)))
    parts = []
    for i, (name, row) in enumerate(zip(figure.rows, figure.cells, strict=True)):
        parts.append(f'<text x="{left - 6}" y="{22 + 30 * i}" text-anchor="end">{name}</text>')
        for j, value in enumerate(row):
            box = f'x="{left + j * cell:.1f}" y="{3 + 30 * i}" width="{cell - 2:.1f}" height="28"'
            if value is None:
                parts.append(f'<rect class="none" {box}/>')
                continue
            ink, place = "pale" if value < 0.45 else "dark", f'x="{left + (j + 0.5) * cell:.1f}" y="{22 + 30 * i}"'
            parts.append(f'<rect {box} fill="{color(value)}"/>')
            parts.append(f'<text class="{ink}" {place} text-anchor="middle">{value:.2f}</text>')
    bottom = 3 + 30 * len(figure.rows)
    for j, name in enumerate(figure.columns):
        parts.append(f'<text x="{left + (j + 0.5) * cell:.1f}" y="{bottom + 14}" text-anchor="middle">{name}</text>')
    parts.append(f'<text x="0" y="{bottom + 14}">tokens</text>')
    return _svg(figure.title, bottom + 20, parts)


def key(names: Sequence[str]) -> str:
    """What the colours mean."""
    spans = (f'<span><i class="c{number}"></i>{escape(name)}</span>' for name, number in order(names).items())
    return f'<p class="key">{"".join(spans)}</p>'


def _svg(name: str, height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(name)}">{"".join(parts)}</svg>'
