"""What every output shares: byte units, colors, small figures as SVG, and the check whether matplotlib is there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.util import find_spec

from keepkv.errors import KeepKVError

MARGIN = 64  # pixels beside a figure's left edge, for names
_LEGEND = 40  # steps of a color scale


def size(count: float) -> str:
    """Bytes in decimal units, for people.

    Examples:
        >>> size(226_800_000)
        '226.8 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"


def require_matplotlib() -> None:
    """Raises KeepKVError where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise KeepKVError(
            "a picture needs matplotlib, which is not installed: pip install 'keepkv[plot]' (--html needs nothing)"
        )


VIRIDIS = ["440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725"]


def color(share: float) -> str:
    """The color of a share from 0 to 1 on matplotlib's scale "viridis", as #rrggbb."""
    place = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
    index = int(place)
    low = VIRIDIS[index]
    high = VIRIDIS[min(index + 1, len(VIRIDIS) - 1)]
    weight = place % 1
    channels = (int(low[i : i + 2], 16) * (1 - weight) + int(high[i : i + 2], 16) * weight for i in (0, 2, 4))
    return "#" + "".join(f"{round(channel):02x}" for channel in channels)


def short(number: float) -> str:
    """A number with one decimal at most: 3.0 is "3"."""
    return f"{number:.1f}".removesuffix(".0")


def svg_image(name: str, width: float, height: float, shapes: Sequence[str]) -> str:
    """Shapes as one SVG image, which carries its own letters and colors, so that it can stand in any page or notebook."""
    box = f'viewBox="0 0 {short(width)} {short(height)}" width="{short(width)}" height="{short(height)}"'
    style = 'font-family="system-ui,sans-serif" font-size="11" fill="currentColor"'
    return f'<svg {box} {style} role="img" aria-label="{escape(name)}">{"".join(shapes)}</svg>'


def slots_figure(
    slots: Sequence[Sequence[int]], layers: Sequence[int] | None = None, column: float | None = None, cell: int = 14
) -> str:
    """Slots of every layer (columns) and KV head (rows) as an SVG image, colored on a log scale.

    Args:
        slots: A number for every layer and head, `slots[layer][head]`.
        layers: The layers' names; by default 0, 1, ...
        column: Width of a layer in pixels; by default what makes the figure about 480 pixels wide.
        cell: Height of a head in pixels.
    """
    layers = range(len(slots)) if layers is None else layers
    column = max(5.0, 400 / len(slots)) if column is None else column
    every = [count for heads in slots for count in heads]
    least = max(1, min(every))
    most = max(every)
    rows = max(map(len, slots))
    bottom = 8 + cell * rows
    shapes = []
    for index, (layer, heads) in enumerate(zip(layers, slots, strict=True)):
        left = MARGIN + index * column
        for head, count in enumerate(heads):
            share = math.log(max(count, least) / least) / math.log(most / least) if most > least else 0.5
            top = 8 + head * cell
            tip = f"<title>layer {layer}, head {head}: {count:,} slots</title>"
            place = f'x="{short(left)}" y="{top}" width="{short(column - 1)}" height="{cell - 1}"'
            shapes.append(f'<rect {place} fill="{color(share)}">{tip}</rect>')
            if column >= 7 * len(f"{most}"):
                tone = 'class="pale" fill="#fff"' if share < 0.45 else 'class="dark" fill="#111"'
                place = f'x="{short(left + column / 2)}" y="{top + round(cell * 2 / 3)}"'
                shapes.append(f'<text {tone} {place} text-anchor="middle" font-size="10">{count}</text>')
    for head in range(rows):
        middle = 8 + head * cell + round(cell * 2 / 3)
        shapes.append(f'<text x="{MARGIN - 8}" y="{middle}" text-anchor="end">head {head}</text>')
    shapes += layer_axis(layers, column, bottom + 16)
    for step in range(_LEGEND):
        place = f'x="{short(MARGIN + step * 200 / _LEGEND)}" y="{bottom + 44}" width="{200 / _LEGEND + 0.5}" height="10"'
        shapes.append(f'<rect {place} fill="{color(step / (_LEGEND - 1))}"/>')
    shapes.append(f'<text x="{MARGIN}" y="{bottom + 70}">{least:,}</text>')
    shapes.append(f'<text x="{MARGIN + 200}" y="{bottom + 70}" text-anchor="end">{most:,} slots</text>')
    width = MARGIN + max(column * len(slots), 200) + 12
    return svg_image("Slots per layer and KV head", width, bottom + 78, shapes)


def layer_axis(layers: Sequence[int], column: float, y: float) -> Iterator[str]:
    """The layers' names below columns of a width, as many as there is room for."""
    step = max(1, math.ceil(20 / column))
    for index, layer in enumerate(layers):
        if index % step == 0:
            x = short(MARGIN + (index + 0.5) * column)
            yield f'<text x="{x}" y="{short(y)}" text-anchor="middle">{layer}</text>'
    yield f'<text x="{short(MARGIN + len(layers) * column / 2)}" y="{short(y + 18)}" text-anchor="middle">layer</text>'


def text_table(rows: Mapping[str, str]) -> str:
    """Names and what belongs to them, in two aligned columns of plain text."""
    width = max(map(len, rows), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def html_table(rows: Mapping[str, str], figure: str = "") -> str:
    """Names and what belongs to them as an HTML table, escaped, and below it a figure, as a notebook shows it."""
    left = 'style="text-align:left"'
    lines = (f"<tr><th {left}>{escape(name)}</th><td {left}>{escape(value)}</td></tr>" for name, value in rows.items())
    below = f'<div style="overflow-x:auto">{figure}</div>' if figure else ""
    return f"<div><table>{''.join(lines)}</table>{below}</div>"
