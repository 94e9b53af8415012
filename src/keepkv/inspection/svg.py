"""The figures of an anatomy as SVG, drawn by hand so that they need no package. Colors are the page's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from keepkv.inspection.anatomy import Anatomy, HeadSlots
from keepkv.render import MARGIN as LEFT
from keepkv.render import layer_axis, short, slots_figure, svg_image

RIGHT = 12  # room beside the plot, in pixels
COLUMNS = 600  # of the figure over positions, at most
Scale = Callable[[float], float]  # from a value to its height


def budgets(anatomy: Anatomy) -> str:
    """Slots, layers × heads, colored on a log scale."""
    layers, _, column = _grid(anatomy)
    slots = [[head.result.slots for head in layer] for layer in layers]
    return slots_figure(slots, [layer[0].layer for layer in layers], column, cell=24)


def errors(anatomy: Anatomy) -> str:
    """Error per head, joined by a line with the error had it been evicted; log axis."""
    layers, width, column = _grid(anatomy)
    every = [error for head in anatomy.heads for error in (head.result.error, head.result.evict_error)]
    axis, y = _log_axis([min(1.0, max(error, 1e-4)) for error in every], width, 250, percent=True)
    parts = [*axis]
    for i, layer in enumerate(layers):
        if i % 2:
            parts.append(f'<rect class="band" x="{short(LEFT + i * column)}" y="10" width="{short(column)}" height="240"/>')
        for j, head in enumerate(layer):
            x = short(LEFT + (i + (j + 1) / (len(layer) + 1)) * column)
            ours = short(y(head.result.error))
            evicted = short(y(head.result.evict_error))
            tip = _tip(head, f"error {head.result.error:.2%}, evicted {head.result.evict_error:.2%}")
            mark = f'<circle class="ours" cx="{x}" cy="{ours}" r="3"/>'
            if head.result.fallbacks:
                mark = f'<path class="fell" d="M{x} {ours}m-4 -4l8 8m0 -8l-8 8"/>'
            parts.append(
                f'<g>{tip}<line class="gain" x1="{x}" x2="{x}" y1="{ours}" y2="{evicted}"/>'
                f'<circle class="evicted" cx="{x}" cy="{evicted}" r="2.5"/>{mark}</g>'
            )
    parts += layer_axis([layer[0].layer for layer in layers], column, 266)
    return svg_image("Error per layer and KV head", width, 290, parts)


def votes(anatomy: Anatomy) -> str:
    """Votes per token over the text: largest and mean of each column of tokens; log axis."""
    total = anatomy.votes
    width = 960
    per = math.ceil(len(total) / COLUMNS)
    columns = [total[lo : lo + per] for lo in range(0, len(total), per)]
    axis, y = _log_axis([max(vote, 0.1) for vote in total], width, 250)
    step = (width - LEFT - RIGHT) / len(columns)
    parts = [*axis]
    for kind, of in (("most", max), ("mean", lambda column: sum(column) / len(column))):
        steps = "".join(f"V{short(y(of(column)))}H{short(LEFT + (i + 1) * step)}" for i, column in enumerate(columns))
        parts.append(f'<path class="{kind}" d="M{LEFT} 250{steps}V250Z"/>')
    full = short(y(len(anatomy.heads)))
    parts.append(f'<line class="full" x1="{LEFT}" x2="{width - RIGHT}" y1="{full}" y2="{full}"/>')
    parts.append(f'<text x="{width - RIGHT}" y="{float(full) - 5:.1f}" text-anchor="end" class="over">full cache</text>')
    for position in _round_steps(len(total)):
        x = short(LEFT + step * position / per)
        parts.append(f'<text x="{x}" y="266" text-anchor="middle">{position:,}</text>')
    parts.append(f'<text x="{(width + LEFT) / 2:.0f}" y="284" text-anchor="middle">token of the text</text>')
    return svg_image("Votes per token, summed over all layers and heads", width, 290, parts)


def _grid(anatomy: Anatomy) -> tuple[list[list[HeadSlots]], float, float]:
    """The layers, the figure's width, and a layer's: at least 5 pixels a head."""
    layers = anatomy.layers
    column = max((960 - LEFT - RIGHT) / len(layers), 5.0 * max(map(len, layers)))
    return layers, LEFT + column * len(layers) + RIGHT, column


def _log_axis(values: Sequence[float], width: float, bottom: float, percent: bool = False) -> tuple[list[str], Scale]:
    """Decades from below the smallest to above the largest value, as marks, and the height of a value."""
    low = math.floor(math.log10(min(values)))
    high = max(math.ceil(math.log10(max(values))), low + 1)

    def y(value: float) -> float:
        share = (math.log10(max(value, 10.0**low)) - low) / (high - low)
        return bottom - (bottom - 10) * min(share, 1.0)

    marks = []
    for power in range(low, high + 1):
        height = short(y(10.0**power))
        name = f"{_decade(power + 2)}%" if percent else _decade(power)
        marks.append(f'<line class="grid" x1="{LEFT}" x2="{short(width - RIGHT)}" y1="{height}" y2="{height}"/>')
        marks.append(f'<text x="{LEFT - 8}" y="{float(height) + 4:.1f}" text-anchor="end">{name}</text>')
    return marks, y


def _decade(power: int) -> str:
    return f"{10**power:,}" if power >= 0 else f"{10.0**power:.{-power}f}"


def _round_steps(count: int) -> range:
    """Some eight round numbers below `count`."""
    rough = 10 ** math.floor(math.log10(max(count / 4, 1)))
    return range(0, count, next(rough * factor for factor in (1, 2, 5, 10) if count / (rough * factor) <= 10))


def _tip(head: HeadSlots, fact: str) -> str:
    return f"<title>{escape(f'layer {head.layer}, head {head.head}: {fact}')}</title>"
