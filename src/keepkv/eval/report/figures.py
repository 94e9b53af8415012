"""What the figures show: svg.py draws them for the HTML page, png.py as files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from keepkv.eval.bootstrap import Interval
from keepkv.eval.records import Record
from keepkv.eval.report.cells import title
from keepkv.eval.summary import ALL, FULL, Summary, SummaryRow


class Point(NamedTuple):
    """A point with the ends of its interval in y, and what it is called."""

    x: float
    y: float
    low: float
    high: float
    name: str


@dataclass(frozen=True)
class Curves:
    """Points per method, joined by lines; y from 0 to 1 if it is a share. x is logarithmic."""

    key: str
    title: str
    note: str
    x: str
    y: str
    series: Mapping[str, Sequence[Point]]
    percent: bool = False  # x is a share


@dataclass(frozen=True)
class Bars:
    """For every task one bar per method, from 0 to 1, with its interval."""

    key: str
    title: str
    note: str
    groups: Mapping[str, Mapping[str, Interval]]


@dataclass(frozen=True)
class Heat:
    """Scores by depth (rows) and length (columns), None where nothing was asked."""

    key: str
    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[str]
    cells: Sequence[Sequence[float | None]]


Figure = Curves | Bars | Heat
MOST_HEAT = 32  # heat maps of a model: of more variants nobody looks at all of them
BANDS = (0.2, 0.4, 0.6, 0.8, 1.01)  # upper ends of the depths that a row of a heat map holds


def all_of(records: Sequence[Record], summary: Summary) -> list[Figure]:
    """Quality against bytes, bars per budget, needles by depth, time against length; for every model that was run."""
    figures: list[Figure] = []
    units = sorted({(record.model, record.dtype) for record in records})
    for model, dtype in units:
        name = f" · {title(model, dtype, [m for m, _ in units if sum(m == n for n, _ in units) > 1])}" if len(units) > 1 else ""
        of_model = [record for record in records if (record.model, record.dtype) == (model, dtype)]
        rows = [row for row in summary.rows if (row.model, row.dtype) == (model, dtype) and not row.left_out]
        figures.append(_pareto(rows, name))
        figures += _bars(rows, name)
        figures += _heat(of_model, name)
        figures += _time(of_model, name)
    return figures


def _label(method: str, slot_dtype: str) -> str:
    """What a method is called in a figure: with its slot dtype, if that is not the model's."""
    return f"{method} {slot_dtype}".removesuffix(" float")


def _pareto(rows: Sequence[SummaryRow], name: str) -> Figure:
    series: dict[str, list[Point]] = defaultdict(list)
    for row in rows:
        if row.task == ALL and row.retained and row.share:
            label = _label(row.method, row.slot_dtype)
            series[label].append(Point(row.share, *row.retained, f"{label} at {row.budget}"))
    return Curves(
        key=f"pareto{_slug(name)}",
        title=f"Quality against bytes{name}",
        note="The retained share of the full cache's scores against the bytes stored. Higher and further left is better.",
        x="share of the full cache's bytes",
        y="retained",
        series={method: sorted(points) for method, points in series.items()},
        percent=True,
    )


def _bars(rows: Sequence[SummaryRow], name: str) -> list[Figure]:
    figures: list[Figure] = []
    for budget in dict.fromkeys(row.budget_and_slots for row in rows if not row.is_full):
        groups: dict[str, dict[str, Interval]] = defaultdict(dict)
        for row in rows:
            if row.budget_and_slots == budget and row.retained:
                label = f"{row.task}, {row.length:,} tokens" if row.length else row.task
                groups[label][row.method] = row.retained
        note = "Retained share, with bootstrap intervals over texts. Where intervals overlap, see the paired differences."
        figures.append(Bars(f"tasks-{_slug(budget)}{_slug(name)}", f"Tasks at {budget}{name}", note, dict(groups)))
    return figures


def _heat(records: Sequence[Record], name: str) -> list[Figure]:
    placed = [record for record in records if record.depth is not None and record.length and record.task != "turns"]
    lengths = sorted({record.length for record in placed})
    scores: dict[tuple[str, str, str], dict[tuple[int, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in placed:
        if record.depth is not None:
            band = next(i for i, end in enumerate(BANDS) if record.depth < end)
            scores[record.method, record.budget, record.slot_dtype][band, record.length].append(record.score)
    if len(scores) > MOST_HEAT:
        return []
    figures: list[Figure] = []
    for method, budget, slot_dtype in sorted(scores, key=lambda variant: (variant[0] != FULL, variant)):
        means = {place: fmean(values) for place, values in scores[method, budget, slot_dtype].items()}
        cells = [[means.get((i, n)) for n in lengths] for i in range(len(BANDS))]
        rows = [f"{20 * i}–{20 * i + 20}%" for i in range(len(BANDS))]
        note = (
            "Mean score by the depth of the answer in the text, and by the length of the text in tokens, of all tasks whose "
            "answer stands at one place."
        )
        label = _label(method, slot_dtype)
        key = f"depth-{_slug(label)}-{_slug(budget)}{_slug(name)}"
        figures.append(Heat(key, f"By depth: {label}, {budget}{name}", note, [f"{n:,}" for n in lengths], rows, cells))
    return figures


def _time(records: Sequence[Record], name: str) -> list[Figure]:
    seconds: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record.question == 0 and not record.failed and record.seconds.get("read"):
            method = _label(record.method, record.slot_dtype)
            label = method if method == FULL else f"{method}, {record.budget}"
            length = record.length or 100 * round(record.tokens / 100)
            seconds[label][length].append(sum(record.seconds.get(part, 0.0) for part in ("read", "repeat", "compress")))
    series = {
        label: [Point(float(n), fmean(t), min(t), max(t), f"{label}, {n:,} tokens") for n, t in sorted(by_length.items())]
        for label, by_length in seconds.items()
    }
    if not series:
        return []
    note = "Seconds of reading, repeating and compressing: mean, least and most over texts. They depend on the machine's load."
    return [Curves(f"time{_slug(name)}", f"Time against length{name}", note, "tokens of the text", "seconds", series)]


def _slug(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in text.replace("%", "")).lower()
