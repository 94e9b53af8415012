"""The figures as SVG, each as wide as a phone's screen. They need no script and no style sheet but the page's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from keepkv.eval.report.figures import Bars, Curves, Figure, Heat
from keepkv.render import color

WIDTH = 340  # of a figure, in CSS pixels; so are the margins
LEFT = 44
RIGHT = 12
TOP = 24
BOTTOM = 210  # of the curves' axes
COLORS = 8  # of the page: --c0 to --c7


def color_numbers(names: Sequence[str]) -> dict[str, int]:
    """A color for every name, the same in all figures: 0 for the full cache, 1 for keepkv, then by name."""
    in_order = sorted({*names, "full"}, key=lambda name: (name != "full", name.split(",")[0] != "keepkv", name))
    return {name: i and 1 + (i - 1) % (COLORS - 1) for i, name in enumerate(in_order) if name in names}


def draw(figure: Figure) -> str:
    """The SVG element of a figure."""
    if isinstance(figure, Curves):
        return _curves(figure)
    return _bars(figure) if isinstance(figure, Bars) else _heat(figure)


def _curves(figure: Curves) -> str:
    points = [point for series in figure.series.values() for point in series]
    if not points:
        return ""
    lowest, highest = (math.log10(limit(point.x for point in points)) for limit in (min, max))
    margin = 0.1 if highest - lowest < 0.05 else 0.05 * (highest - lowest)
    low, high = lowest - margin, highest + margin
    top = (1.0 if figure.percent else max(point.high for point in points)) or 1.0

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(value) - low) / (high - low)

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * min(value / top, 1.0)

    elements = []
    for fraction in (0, 0.25, 0.5, 0.75, 1):
        tick = fraction * top
        elements.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        elements.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    last = -100.0
    for value in sorted({point.x for point in points}):
        if x(value) - last > 44:
            last = x(value)
            text = _tick_text(value, figure.percent)
            elements.append(f'<text x="{last:.1f}" y="{BOTTOM + 16}" text-anchor="middle">{text}</text>')
    numbers = color_numbers(list(figure.series))
    for nth, (name, series) in enumerate(figure.series.items()):
        shift = 4.0 * (nth - (len(figure.series) - 1) / 2)  # so that intervals do not cover each other
        ink = f"c{numbers[name]}"
        line = " ".join(f"{x(p.x) + shift:.1f},{y(p.y):.1f}" for p in series)
        elements.append(f'<polyline class="line {ink}" points="{line}"/>')
        for p in series:
            center = f"{x(p.x) + shift:.1f}"
            elements.append(
                f'<g class="{ink}"><title>{escape(p.name)}: {p.y:.3g} [{p.low:.3g}, {p.high:.3g}]</title>'
                f'<line x1="{center}" x2="{center}" y1="{y(p.low):.1f}" y2="{y(p.high):.1f}"/>'
                f'<circle cx="{center}" cy="{y(p.y):.1f}" r="4"/></g>'
            )
    elements.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{BOTTOM + 34}" text-anchor="middle">{escape(figure.x)}</text>')
    elements.append(f'<text x="0" y="10" class="axis">{escape(figure.y)}</text>')
    return _svg(figure.title, BOTTOM + 40, elements) + key(list(figure.series))


def _tick_text(value: float, percent: bool) -> str:
    if not percent:
        return f"{value:,.0f}"
    return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def _bars(figure: Bars) -> str:
    names = list(dict.fromkeys(name for group in figure.groups.values() for name in group))
    numbers = color_numbers(names)
    width = WIDTH - 60
    elements = []
    at = 0.0
    for task, group in figure.groups.items():
        elements.append(f'<text x="0" y="{at + 14:.0f}" class="axis">{escape(task)}</text>')
        at += 20
        for name in sorted(group, key=lambda name: numbers[name]):
            interval = group[name]
            ends = f'x1="{width * interval.low:.1f}" x2="{width * interval.high:.1f}" y1="{at + 5.5}" y2="{at + 5.5}"'
            elements.append(
                f'<g class="c{numbers[name]}"><title>{escape(f"{name}: {interval}")}</title>'
                f'<rect x="0" y="{at:.0f}" width="{max(1.0, width * interval.value):.1f}" height="11"/>'
                f'<line class="whisker" {ends}/></g>'
                f'<text x="{WIDTH}" y="{at + 10:.0f}" text-anchor="end">{interval.value:.2f}</text>'
            )
            at += 14
        at += 6
    return _svg(figure.title, round(at), elements) + key(names)


def _heat(figure: Heat) -> str:
    left = 62
    cell = min(90.0, (WIDTH - left) / max(1, len(figure.columns)))
    elements = []
    for i, (name, row) in enumerate(zip(figure.rows, figure.cells, strict=True)):
        elements.append(f'<text x="{left - 6}" y="{22 + 30 * i}" text-anchor="end">{name}</text>')
        for j, value in enumerate(row):
            box = f'x="{left + j * cell:.1f}" y="{3 + 30 * i}" width="{cell - 2:.1f}" height="28"'
            if value is None:
                elements.append(f'<rect class="none" {box}/>')
                continue
            ink = "pale" if value < 0.45 else "dark"
            center = f'x="{left + (j + 0.5) * cell:.1f}" y="{22 + 30 * i}"'
            elements.append(f'<rect {box} fill="{color(value)}"/>')
            elements.append(f'<text class="{ink}" {center} text-anchor="middle">{value:.2f}</text>')
    bottom = 3 + 30 * len(figure.rows)
    for j, name in enumerate(figure.columns):
        elements.append(f'<text x="{left + (j + 0.5) * cell:.1f}" y="{bottom + 14}" text-anchor="middle">{name}</text>')
    elements.append(f'<text x="0" y="{bottom + 14}">tokens</text>')
    return _svg(figure.title, bottom + 20, elements)


def key(names: Sequence[str]) -> str:
    """The legend: what the colors mean."""
    spans = (f'<span><i class="c{number}"></i>{escape(name)}</span>' for name, number in color_numbers(names).items())
    return f'<p class="key">{"".join(spans)}</p>'


def _svg(name: str, height: float, elements: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(name)}">{"".join(elements)}</svg>'
