"""An anatomy as one picture, drawn with matplotlib, which is an extra: pip install 'keepkv[plot]'."""

from __future__ import annotations

from pathlib import Path

from keepkv.inspection.anatomy import Anatomy, HeadSlots
from keepkv.paths import atomic_file
from keepkv.render import require_matplotlib


def save(anatomy: Anatomy, path: Path) -> None:
    """Budgets, errors, votes, and what was kept over the text, as a PNG file. Raises KeepKVError without matplotlib."""
    require_matplotlib()
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    report, layers, heads = anatomy.report, anatomy.layers, anatomy.heads
    wide = max(map(len, layers))
    figure = Figure(figsize=(11, 10.4 + 0.16 * wide), dpi=150, layout="constrained")
    figure.suptitle(
        f"{report.tokens[0]:,} tokens in {report.slots_per_head:,.0f} slots per KV head ({anatomy.model}, {report.method})",
        fontsize=14,
    )
    budgets, errors, votes, kept = figure.subplots(4, 1, height_ratios=[0.6 + 0.16 * wide, 2.6, 2.2, 1.6])

    counts = [[head.result.slots for head in layer] + [0] * (wide - len(layer)) for layer in layers]
    least, most = (pick(head.result.slots for head in heads) for pick in (min, max))
    scale = LogNorm(max(1, least), max(2, most, least + 1), clip=True)
    image = budgets.imshow(list(zip(*counts, strict=True)), aspect="auto", norm=scale, cmap="viridis")
    budgets.set(title="Slots of every layer and KV head", ylabel="KV head", xlabel="layer")
    budgets.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    ticks = sorted({max(1, least), round(report.slots_per_head), most})
    bar = figure.colorbar(image, ax=budgets, pad=0.01, ticks=ticks, format="{x:,.0f}")
    bar.minorticks_off()

    place = [i + (head.head + 1) / (wide + 1) - 0.5 for i, layer in enumerate(layers) for head in layer]
    ours, evicted = ([max(1e-4, error) for error in row] for row in zip(*map(_errors, heads), strict=True))
    if anatomy.judged:
        errors.vlines(place, ours, evicted, color="0.7", lw=1, zorder=1)
        errors.scatter(place, evicted, s=16, facecolors="white", edgecolors="0.45", label="had it been evicted", zorder=2)
        errors.scatter(place, ours, s=16, color="#1f5fae", label="error", zorder=3)
        fell = [(x, y) for x, y, head in zip(place, ours, heads, strict=True) if head.result.fallbacks]
        if fell:
            errors.scatter(
                *zip(*fell, strict=True), s=40, marker="x", color="#b3261e", label="fallen back to eviction", zorder=4
            )
        errors.set(yscale="log", title="Share of each head's output that is lost, on held-out queries", xlabel="layer")
        errors.yaxis.set_major_formatter(lambda error, _: f"{100 * error:g}%")
        errors.legend(ncols=3, fontsize=8)
    else:
        errors.set_axis_off()
        errors.text(0.5, 0.5, "this method holds no queries out: no errors to show", ha="center", transform=errors.transAxes)
    for axes in (budgets, errors):
        axes.set_xlim(-0.5, len(layers) - 0.5)
        every = range(0, len(layers), max(1, len(layers) // 30))
        axes.set_xticks(every, [str(layers[i][0].layer) for i in every])

    total = anatomy.votes
    votes.fill_between(range(len(total)), 0.1, [max(0.1, vote) for vote in total], step="mid", color="#1f5fae", lw=0.5)
    votes.axhline(len(heads), color="black", ls="--", lw=1, label="full cache")
    votes.set(yscale="log", ylim=(0.1, None), title="Votes per token, summed over all layers and heads")
    votes.legend(fontsize=8)
    share = [100 * count / len(heads) for count in anatomy.keepers]
    kept.fill_between(range(len(share)), share, step="mid", color="#c4701b", lw=0.5)
    kept.set(ylim=(0, 100), title="Percentage of layers and heads that kept each token", xlabel="token of the text")
    for axes in (votes, kept):
        axes.set_xlim(-0.01 * len(total), 1.01 * len(total))
    with atomic_file(path) as scratch:
        figure.savefig(scratch, format="png")


def _errors(head: HeadSlots) -> tuple[float, float]:
    return head.result.error, head.result.evict_error
