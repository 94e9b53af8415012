"""The figures as PNG files, drawn with matplotlib, which is an extra: pip install 'keepkv[plot]'."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keepkv.eval.report.figures import Bars, Curves, Figure, Heat
from keepkv.eval.report.svg import order
from keepkv.render import require_matplotlib

INKS = ("#5a6068", "#1f5fae", "#c4501b", "#2a8a4a", "#8a3fae", "#a8791b", "#1b8a8f", "#b3266e")


def save(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """One file for every figure, and one for all heat maps together. Raises KeepKVError without matplotlib."""
    require_matplotlib()
    from matplotlib.figure import Figure as Canvas

    files = []
    for figure in figures:
        if isinstance(figure, Heat):
            continue
        tall = 0.28 * sum(map(len, figure.groups.values())) + 1.2 if isinstance(figure, Bars) else 4.5
        canvas = Canvas(figsize=(7, max(3, tall)), dpi=150, layout="constrained")
        axes = canvas.subplots()
        _bars(axes, figure) if isinstance(figure, Bars) else _curves(axes, figure)
        axes.set_title(figure.title)
        files.append(folder / f"{figure.key}.png")
        canvas.savefig(files[-1])
    heat = [figure for figure in figures if isinstance(figure, Heat)]
    if heat:
        wide = min(4, len(heat))
        canvas = Canvas(figsize=(3.4 * wide, 3 * -(-len(heat) // wide)), dpi=150, layout="constrained")
        panels = canvas.subplots(-(-len(heat) // wide), wide, squeeze=False).flat
        for axes, figure in zip(panels, heat, strict=False):
            _heat(axes, figure)
        for axes in list(canvas.axes)[len(heat) :]:
            axes.set_axis_off()
        files.append(folder / "depth.png")
        canvas.savefig(files[-1])
    return files


def _curves(axes: Any, figure: Curves) -> None:
    colours = order(list(figure.series))
    for nth, (name, points) in enumerate(figure.series.items()):
        aside = 1.012 ** (nth - (len(figure.series) - 1) / 2)  # so that intervals do not cover each other
        x, y = [p.x * aside for p in points], [p.y for p in points]
        spread = [[p.y - p.low for p in points], [p.high - p.y for p in points]]
        axes.errorbar(x, y, yerr=spread, marker="o", capsize=3, lw=1.2, color=INKS[colours[name]], label=name)
    axes.set(xscale="log", xlabel=figure.x, ylabel=figure.y, ylim=(0, 1.03) if figure.percent else (0, None))
    ticks = sorted({p.x for points in figure.series.values() for p in points})
    apart = [x for i, x in enumerate(ticks) if i == 0 or x > 1.15 * ticks[i - 1]]
    axes.set_xticks(apart, [f"{x:,.0f}" if not figure.percent else f"{100 * x:.3g}%" for x in apart])
    axes.minorticks_off()
    if len(apart) == 1:
        axes.set_xlim(apart[0] / 1.5, apart[0] * 1.5)
    axes.grid(axis="y", alpha=0.3)
    axes.figure.legend(fontsize=8, loc="outside lower center", ncols=4, frameon=False)


def _bars(axes: Any, figure: Bars) -> None:
    colours = order([name for group in figure.groups.values() for name in group])
    at, places, names, shown = 0.0, [], [], set()
    for task, group in figure.groups.items():
        start = at
        for name in sorted(group, key=lambda name: colours[name]):
            found = group[name]
            spread = [[found.value - found.low], [found.high - found.value]]
            label = None if name in shown else name
            shown.add(name)
            axes.barh(
                at, found.value, xerr=spread, height=0.85, color=INKS[colours[name]], label=label, ecolor="0.2", capsize=2
            )
            at += 1
        places.append((start + at - 1) / 2)
        names.append(task)
        at += 0.7
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.02), xlabel="retained")
    axes.figure.legend(fontsize=8, loc="outside lower center", ncols=4, frameon=False)


def _heat(axes: Any, figure: Heat) -> None:
    cells = [[float("nan") if value is None else value for value in row] for row in figure.cells]
    axes.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for i, row in enumerate(figure.cells):
        for j, value in enumerate(row):
            if value is not None:
                axes.text(
                    j, i, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.45 else "black", fontsize=9
                )
    axes.set_title(figure.title.removeprefix("By depth: "), fontsize=9)
    axes.set_xticks(range(len(figure.columns)), figure.columns)
    axes.set_yticks(range(len(figure.rows)), figure.rows)
