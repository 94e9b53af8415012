"""The figures as PNG files, drawn with matplotlib, which is an extra: pip install 'keepkv[plot]'."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keepkv.eval.report.figures import Bars, Curves, Figure, Heat
from keepkv.eval.report.svg import color_numbers
from keepkv.paths import atomic_file
from keepkv.render import require_matplotlib

INKS = ("#5a6068", "#1f5fae", "#c4501b", "#2a8a4a", "#8a3fae", "#a8791b", "#1b8a8f", "#b3266e")


def save_figures(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """One file for every figure, and one for all heat maps together. Raises KeepKVError without matplotlib."""
    require_matplotlib()
    from matplotlib.figure import Figure as Canvas

    files = []
    for figure in figures:
        if isinstance(figure, Heat):
            continue
        height = 0.28 * sum(map(len, figure.groups.values())) + 1.2 if isinstance(figure, Bars) else 4.5
        canvas = Canvas(figsize=(7, max(3, height)), dpi=150, layout="constrained")
        axes = canvas.subplots()
        _bars(axes, figure) if isinstance(figure, Bars) else _curves(axes, figure)
        axes.set_title(figure.title)
        files.append(folder / f"{figure.key}.png")
        _save(canvas, files[-1])
    heat = [figure for figure in figures if isinstance(figure, Heat)]
    if heat:
        columns = min(4, len(heat))
        rows = -(-len(heat) // columns)
        canvas = Canvas(figsize=(3.4 * columns, 3 * rows), dpi=150, layout="constrained")
        panels = canvas.subplots(rows, columns, squeeze=False).flat
        for axes, figure in zip(panels, heat, strict=False):
            _heat(axes, figure)
        for axes in list(canvas.axes)[len(heat) :]:
            axes.set_axis_off()
        files.append(folder / "depth.png")
        _save(canvas, files[-1])
    return files


def _save(canvas: Any, file: Path) -> None:
    with atomic_file(file) as scratch:
        canvas.savefig(scratch, format="png")


def _curves(axes: Any, figure: Curves) -> None:
    numbers = color_numbers(list(figure.series))
    for nth, (name, points) in enumerate(figure.series.items()):
        shift = 1.012 ** (nth - (len(figure.series) - 1) / 2)  # so that intervals do not cover each other
        x = [p.x * shift for p in points]
        y = [p.y for p in points]
        errors = [[p.y - p.low for p in points], [p.high - p.y for p in points]]
        axes.errorbar(x, y, yerr=errors, marker="o", capsize=3, lw=1.2, color=INKS[numbers[name]], label=name)
    axes.set(xscale="log", xlabel=figure.x, ylabel=figure.y, ylim=(0, 1.03) if figure.percent else (0, None))
    values = sorted({p.x for points in figure.series.values() for p in points})
    ticks = [x for i, x in enumerate(values) if i == 0 or x > 1.15 * values[i - 1]]
    axes.set_xticks(ticks, [f"{100 * x:.3g}%" if figure.percent else f"{x:,.0f}" for x in ticks])
    axes.minorticks_off()
    if len(ticks) == 1:
        axes.set_xlim(ticks[0] / 1.5, ticks[0] * 1.5)
    axes.grid(axis="y", alpha=0.3)
    axes.figure.legend(fontsize=8, loc="outside lower center", ncols=4, frameon=False)


def _bars(axes: Any, figure: Bars) -> None:
    numbers = color_numbers([name for group in figure.groups.values() for name in group])
    in_legend: set[str] = set()
    centers = []
    at = 0.0
    for group in figure.groups.values():
        start = at
        for name in sorted(group, key=lambda name: numbers[name]):
            interval = group[name]
            error = [[interval.value - interval.low], [interval.high - interval.value]]
            style = {"height": 0.85, "color": INKS[numbers[name]], "ecolor": "0.2", "capsize": 2}
            axes.barh(at, interval.value, xerr=error, label=None if name in in_legend else name, **style)
            in_legend.add(name)
            at += 1
        centers.append((start + at - 1) / 2)
        at += 0.7
    axes.set_yticks(centers, list(figure.groups))
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.02), xlabel="retained")
    axes.figure.legend(fontsize=8, loc="outside lower center", ncols=4, frameon=False)


def _heat(axes: Any, figure: Heat) -> None:
    cells = [[float("nan") if value is None else value for value in row] for row in figure.cells]
    axes.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for i, row in enumerate(figure.cells):
        for j, value in enumerate(row):
            if value is not None:
                ink = "white" if value < 0.45 else "black"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=9)
    axes.set_title(figure.title.removeprefix("By depth: "), fontsize=9)
    axes.set_xticks(range(len(figure.columns)), figure.columns)
    axes.set_yticks(range(len(figure.rows)), figure.rows)
