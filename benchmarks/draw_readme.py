"""The README's picture: KL to the full cache against the bytes that are kept, from the committed records.

    python benchmarks/draw_readme.py              # writes docs/images/quality.svg; make picture does the same

The records are what `keepkv fidelity --json` printed: one file per text, every method at every budget (docs/results.md). With
several texts, a point is the mean over them. The SVG brings its own colors for light and dark, and needs no font.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import fmean

HOME = Path(__file__).parent.parent
RECORDS = HOME / "benchmarks" / "results"
PICTURE = HOME / "docs" / "images" / "quality.svg"

NAMED = {"keepkv": "keepkv", "attention-matching": "Attention Matching", "kvzip": "KVzip", "h2o": "H2O", "snapkv": "SnapKV"}
WIDTH, HEIGHT = 600, 450
LEFT, RIGHT, TOP, BOTTOM = 62, 440, 66, 376  # of the plot
SHARES = (0.05, 0.10, 0.25, 0.50)
DIVERGENCES = (0.001, 0.01, 0.1, 1.0)
STYLE = """
svg{color:#57606a}.paper{fill:#fff}.grid{stroke:#d8dee4}.title{color:#1f2328;font-size:17px;font-weight:600}
text{font:15px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;fill:currentColor}
text.title{font-size:17px;font-weight:600}.keepkv text{font-weight:700}
polyline{fill:none;stroke:currentColor;stroke-width:2.2;stroke-linejoin:round}.keepkv polyline{stroke-width:3.6}
circle{fill:currentColor}.other{stroke-width:1;opacity:.35}
.keepkv{color:#0550ae}.attention-matching{color:#b35900}.kvzip{color:#8250df}.h2o{color:#1a7f37}.snapkv{color:#bf3989}
@media(prefers-color-scheme:dark){
svg{color:#9198a1}.paper{fill:#0d1117}.grid{stroke:#2f353d}.title{color:#f0f6fc}
.keepkv{color:#79c0ff}.attention-matching{color:#f0a35e}.kvzip{color:#bc9cff}.h2o{color:#56d364}.snapkv{color:#f27bbd}}
"""
Point = tuple[float, float]


def main() -> None:
    PICTURE.write_text(picture(), encoding="utf-8")


def picture() -> str:
    """The SVG of the committed records."""
    files = sorted(RECORDS.glob("field-*.json"))
    records = [json.loads(file.read_text("utf-8")) for file in files]
    curves = curves_of(records)
    others = [name for name in curves if name not in NAMED]
    first = records[0][0]
    texts = "Moby-Dick" if [file.stem for file in files] == ["field-moby"] else f"{len(files)} texts"
    sample = f"SmolLM2-135M, {texts}, {first['segments']} stretches of {first['context_tokens']:,} tokens; logarithmic axes"

    parts = [
        f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
        text(16, 27, "What a smaller cache costs", 'class="title"'),
        text(16, 49, "KL divergence of the next tokens to the full cache's (lower is better)"),
        *axes(),
        text((LEFT + RIGHT) / 2, BOTTOM + 41, "share of the cache's bytes that is kept", 'text-anchor="middle"'),
        text(16, HEIGHT - 10, sample),
        *(line(curves[name], "other") for name in others),
        text(RIGHT + 8, y(0.09) + 5, f"{len(others)} other methods"),
    ]
    for name in reversed(NAMED):
        marks = [line(curves[name], name), text(RIGHT + 8, y(curves[name][-1][1]) + 5, NAMED[name])]
        if name == "keepkv":
            marks += dots(curves[name])
        parts.append(f'<g class="{name}">{"".join(marks)}</g>')
    about = "KL divergence to the full cache against the share of bytes kept, keepkv beside other methods"
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{about}">'
    return "\n".join([opening, f"<style>{STYLE}</style>", *parts, "</svg>\n"])


def curves_of(records: Sequence[Sequence[dict]]) -> dict[str, list[Point]]:
    """Per method, (share of bytes, mean KL) from the smallest share to the largest, without the full cache."""
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in (row for record in records for row in record):
        share = round(row["kv_bytes"] / row["kv_bytes_full"], 3)
        if share < 1:
            found[row["method"]][share].append(row["kl"])
    return {name: [(share, fmean(kls)) for share, kls in sorted(points.items())] for name, points in found.items()}


def axes() -> list[str]:
    """Grid and numbers; both axes are logarithmic."""
    parts = []
    for share in SHARES:
        parts.append(f'<line class="grid" x1="{x(share):.1f}" x2="{x(share):.1f}" y1="{TOP}" y2="{BOTTOM}"/>')
        parts.append(text(x(share), BOTTOM + 19, f"{share:.0%}", 'text-anchor="middle"'))
    for divergence in DIVERGENCES:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y(divergence):.1f}" y2="{y(divergence):.1f}"/>')
        parts.append(text(LEFT - 8, y(divergence) + 5, f"{divergence:g}", 'text-anchor="end"'))
    return parts


def line(curve: Sequence[Point], kind: str) -> str:
    """One method's curve."""
    points = " ".join(f"{x(share):.1f},{y(divergence):.1f}" for share, divergence in curve)
    return f'<polyline class="{kind}" points="{points}"/>'


def dots(curve: Sequence[Point]) -> list[str]:
    """A curve's points, with their numbers below."""
    parts = []
    for share, divergence in curve:
        number = f"{divergence:.4f}" if divergence < 0.001 else f"{divergence:.3f}"
        parts.append(f'<circle cx="{x(share):.1f}" cy="{y(divergence):.1f}" r="4.5"/>')
        parts.append(text(x(share) - 2, y(divergence) + 22, number, 'text-anchor="end"'))
    return parts


def text(at: float, down: float, words: str, attributes: str = "") -> str:
    return f'<text x="{at:.1f}" y="{down:.1f}"{attributes and " " + attributes}>{escape(words)}</text>'


def x(share: float) -> float:
    return scaled(share, 0.045, 0.53, LEFT, RIGHT)


def y(divergence: float) -> float:
    return scaled(divergence, 0.0003, 1.0, BOTTOM, TOP)


def scaled(value: float, low: float, high: float, start: float, end: float) -> float:
    """Where a value lies between two ends, on a logarithmic scale."""
    return start + (end - start) * math.log(value / low) / math.log(high / low)


if __name__ == "__main__":
    main()
