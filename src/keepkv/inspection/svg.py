"""The figures of an anatomy as SVG, drawn by hand so that they need nothing. Colours are the page's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape

from keepkv.inspection.anatomy import Anatomy, Slotted
from keepkv.render import color

LEFT, RIGHT = 64, 12  # room beside the plot
COLUMNS = 600  # of the figure over positions, at most
Place = Callable[[float], float]


def budgets(anatomy: Anatomy) -> str:
    """Slots, layers × heads, coloured on a log scale."""
    layers, width, column = _grid(anatomy)
    counts = [head.made.slots for head in anatomy.heads]
    low, high = max(1, min(counts)), max(counts)
    cell, rows = 24, max(map(len, layers))
    bottom, parts = 8 + cell * rows, []
    for i, layer in enumerate(layers):
        for j, head in enumerate(layer):
            count = head.made.slots
            part = math.log(max(count, low) / low) / math.log(high / low) if high > low else 0.5
            box = f'x="{_n(LEFT + i * column)}" y="{8 + j * cell}" width="{_n(column - 1)}" height="{cell - 1}"'
            parts.append(f'<rect {box} fill="{color(part)}">{_tip(head, f"{count:,} slots")}</rect>')
            if column >= 7 * len(f"{high}"):
                place = f'x="{_n(LEFT + (i + 0.5) * column)}" y="{8 + j * cell + 16}"'
                parts.append(f'<text class="{"pale" if part < 0.45 else "dark"}" {place} text-anchor="middle">{count}</text>')
    parts += [f'<text x="{LEFT - 8}" y="{24 + j * cell}" text-anchor="end">head {j}</text>' for j in range(rows)]
    parts += _layer_names(layers, column, bottom + 16)
    for step in range(100):
        parts.append(f'<rect x="{LEFT + 2 * step}" y="{bottom + 44}" width="2.5" height="10" fill="{color(step / 99)}"/>')
    parts.append(f'<text x="{LEFT}" y="{bottom + 70}">{low:,}</text>')
    parts.append(f'<text x="{LEFT + 200}" y="{bottom + 70}" text-anchor="end">{high:,} slots</text>')
    return _svg("Slots per layer and KV head", width, bottom + 78, parts)


def errors(anatomy: Anatomy) -> str:
    """Error per head, joined by a line with the error had it been evicted; log axis."""
    layers, width, column = _grid(anatomy)
    found = [error for head in anatomy.heads for error in (head.made.error, head.made.evict_error)]
    axis, y = _log_axis([min(1.0, max(error, 1e-4)) for error in found], width, 250, percent=True)
    parts = [*axis]
    for i, layer in enumerate(layers):
        if i % 2:
            parts.append(f'<rect class="band" x="{_n(LEFT + i * column)}" y="10" width="{_n(column)}" height="240"/>')
        for j, head in enumerate(layer):
            x = _n(LEFT + (i + (j + 1) / (len(layer) + 1)) * column)
            ours, evicted = _n(y(head.made.error)), _n(y(head.made.evict_error))
            tip = _tip(head, f"error {head.made.error:.2%}, evicted {head.made.evict_error:.2%}")
            mark = f'<circle class="ours" cx="{x}" cy="{ours}" r="3"/>'
            if head.made.fallbacks:
                mark = f'<path class="fell" d="M{x} {ours}m-4 -4l8 8m0 -8l-8 8"/>'
            parts.append(
                f'<g>{tip}<line class="gain" x1="{x}" x2="{x}" y1="{ours}" y2="{evicted}"/>'
                f'<circle class="evicted" cx="{x}" cy="{evicted}" r="2.5"/>{mark}</g>'
            )
    parts += _layer_names(layers, column, 266)
    return _svg("Error per layer and KV head", width, 290, parts)


def votes(anatomy: Anatomy) -> str:
    """Votes per token over the text: largest and mean of each column of tokens; log axis."""
    total, width = anatomy.votes, 960
    per = math.ceil(len(total) / COLUMNS)
    columns = [total[lo : lo + per] for lo in range(0, len(total), per)]
    axis, y = _log_axis([max(vote, 0.1) for vote in total], width, 250)
    step = (width - LEFT - RIGHT) / len(columns)
    parts = [*axis]
    for kind, of in (("most", max), ("mean", lambda column: sum(column) / len(column))):
        steps = "".join(f"V{_n(y(of(column)))}H{_n(LEFT + (i + 1) * step)}" for i, column in enumerate(columns))
        parts.append(f'<path class="{kind}" d="M{LEFT} 250{steps}V250Z"/>')
    full = _n(y(len(anatomy.heads)))
    parts.append(f'<line class="full" x1="{LEFT}" x2="{width - RIGHT}" y1="{full}" y2="{full}"/>')
    parts.append(f'<text x="{width - RIGHT}" y="{float(full) - 5:.1f}" text-anchor="end" class="over">full cache</text>')
    for position in _round_steps(len(total)):
        x = _n(LEFT + step * position / per)
        parts.append(f'<text x="{x}" y="266" text-anchor="middle">{position:,}</text>')
    parts.append(f'<text x="{(width + LEFT) / 2:.0f}" y="284" text-anchor="middle">token of the text</text>')
    return _svg("Votes per token, summed over all layers and heads", width, 290, parts)


def _grid(anatomy: Anatomy) -> tuple[list[list[Slotted]], float, float]:
    """The layers, the figure's width, and a layer's: at least 5 pixels a head."""
    layers = anatomy.layers
    column = max((960 - LEFT - RIGHT) / len(layers), 5.0 * max(map(len, layers)))
    return layers, LEFT + column * len(layers) + RIGHT, column


def _layer_names(layers: Sequence[Sequence[Slotted]], column: float, y: float) -> Iterator[str]:
    every = max(1, math.ceil(20 / column))
    for i, layer in enumerate(layers):
        if i % every == 0:
            yield f'<text x="{_n(LEFT + (i + 0.5) * column)}" y="{_n(y)}" text-anchor="middle">{layer[0].layer}</text>'
    yield f'<text x="{_n(LEFT + len(layers) * column / 2)}" y="{_n(y + 18)}" text-anchor="middle">layer</text>'


def _log_axis(values: Sequence[float], width: float, bottom: float, percent: bool = False) -> tuple[list[str], Place]:
    """Decades from below the smallest to above the largest value, as marks, and the height of a value."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)

    def y(value: float) -> float:
        part = (math.log10(max(value, 10.0**low)) - low) / (high - low)
        return bottom - (bottom - 10) * min(part, 1.0)

    marks = []
    for power in range(low, high + 1):
        at, name = _n(y(10.0**power)), f"{_decade(power + 2)}%" if percent else _decade(power)
        marks.append(f'<line class="grid" x1="{LEFT}" x2="{_n(width - RIGHT)}" y1="{at}" y2="{at}"/>')
        marks.append(f'<text x="{LEFT - 8}" y="{float(at) + 4:.1f}" text-anchor="end">{name}</text>')
    return marks, y


def _decade(power: int) -> str:
    return f"{10**power:,}" if power >= 0 else f"{10.0**power:.{-power}f}"


def _round_steps(count: int) -> range:
    """Some eight round numbers below `count`."""
    rough = 10 ** math.floor(math.log10(max(count / 4, 1)))
    return range(0, count, next(rough * factor for factor in (1, 2, 5, 10) if count / (rough * factor) <= 10))


def _tip(head: Slotted, fact: str) -> str:
    return f"<title>{escape(f'layer {head.layer}, head {head.head}: {fact}')}</title>"


def _svg(name: str, width: float, height: float, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {_n(width)} {_n(height)}" width="{_n(width)}" height="{_n(height)}"'
    return f'<svg {size} role="img" aria-label="{escape(name)}">{"".join(parts)}</svg>'


def _n(x: float) -> str:
    return f"{x:.1f}".removesuffix(".0")
