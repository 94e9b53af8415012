"""From records to numbers: no timings, sorted, so that a run that was interrupted ends with the same bytes."""

from __future__ import annotations

import json
import statistics as plain
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from keepkv.errors import InputError
from keepkv.eval.bootstrap import DIFFERENCE, Interval, combined, ranks
from keepkv.eval.records import Key, Record

FILE = "summary.json"
ALL = "all tasks"
FULL = "full"
Pair = Callable[[Record, Record], tuple[float, float]]
Pairs = dict[int, list[tuple[float, float]]]  # of every sample: numerator and denominator of every question


@dataclass(frozen=True)
class Row:
    """One method at one budget on one task and length (or on all: the mean over tasks and lengths).

    score: the mean; retained: Σ min(score, full's score) / Σ full's score; lead: mean of score − full's score, question by
    question; loss: how much less likely a token of the right answer became, in nats. failed questions count as score 0.
    kv_bytes and share (of the full cache's) are means over samples. measures: means.
    """

    model: str
    task: str
    length: int
    budget: str
    method: str
    samples: int
    questions: int
    failed: int
    score: Interval | None
    full: float
    retained: Interval | None
    lead: Interval | None
    loss: float | None
    kv_bytes: int
    share: float
    rank: int
    measures: dict[str, float]


@dataclass(frozen=True)
class Versus:
    """The paired difference in score of two methods at one budget over all tasks; apart: its interval excludes 0."""

    model: str
    budget: str
    first: str
    second: str
    difference: Interval
    apart: bool


@dataclass(frozen=True)
class Summary:
    rows: tuple[Row, ...]
    versus: tuple[Versus, ...]

    def text(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n"


def summarise(records: Iterable[Record]) -> Summary:
    """Rows per task and over all tasks, and all differences between methods. Raises InputError without any full cache."""
    found = sorted(records, key=lambda record: record.key)
    full = {_asked(record): record for record in found if record.method == FULL}
    if not full:
        raise InputError("there are no records of the full cache: nothing to compare with")
    cells: dict[tuple[str, str, int, str, str], list[Record]] = defaultdict(list)
    for record in found:
        cells[record.model, record.task, record.length, record.budget, record.method].append(record)
    rows = [_row(*key, [cell], full) for key, cell in cells.items()]
    versus: list[Versus] = []
    for model in sorted({key[0] for key in cells}):
        for budget in _budgets(key[3] for key in cells if key[0] == model):
            names = sorted({key[4] for key in cells if (key[0], key[3]) == (model, budget)})
            groups = {name: [c for k, c in cells.items() if (k[0], k[3], k[4]) == (model, budget, name)] for name in names}
            compared = list(_compared(model, budget, groups))
            order = ranks(names, {(v.first, v.second): v.difference for v in compared})
            versus += [v for v in compared if v.first < v.second]
            rows += [_row(model, ALL, 0, budget, name, groups[name], full, order[name]) for name in names]
    return Summary(tuple(rows), tuple(versus))


def _asked(record: Record) -> Key:
    return record.key._replace(method=FULL, budget="")


def _budgets(found: Iterable[str]) -> list[str]:
    return sorted(set(found), key=lambda budget: (budget == "100%", budget))


def _row(
    model: str, task: str, length: int, budget: str, method: str, cells: Sequence[Sequence[Record]],
    full: dict[Key, Record], rank: int = 0,
) -> Row:  # fmt: skip
    every = [record for cell in cells for record in cell]
    whole = [record for record in every if not record.failed]

    def over(pair: Pair, limits: tuple[float, float] = (0.0, 1.0)) -> Interval | None:
        return combined([list(_by_sample(cell, full, pair).values()) for cell in cells], limits)

    truths = [full[_asked(record)] for record in every if _asked(record) in full]
    losses = [
        full[_asked(record)].loglik - record.loglik  # type: ignore[operator]
        for record in whole
        if record.loglik is not None and _asked(record) in full and full[_asked(record)].loglik is not None
    ]
    names = sorted(set.intersection(*(set(record.measures) for record in whole))) if whole else []
    return Row(
        model, task, length, budget, method, len({record.key._replace(question=0) for record in every}), len(every),
        len(every) - len(whole), over(lambda r, t: (r.score, 1.0)),
        round(plain.fmean(truth.score for truth in truths), 6) if truths else 0.0,
        Interval(1.0, 1.0, 1.0) if method == FULL else over(lambda r, t: (min(r.score, t.score), t.score)),
        over(lambda r, t: (r.score - t.score, 1.0), DIFFERENCE),
        round(plain.fmean(losses), 6) if losses else None,
        round(plain.fmean(record.kv_bytes for record in whole)) if whole else 0,
        round(plain.fmean(record.kv_bytes / max(1, record.kv_bytes_full) for record in whole), 6) if whole else 0.0,
        rank, {name: round(plain.fmean(record.measures[name] for record in whole), 6) for name in names},
    )  # fmt: skip


def _by_sample(cell: Sequence[Record], full: dict[Key, Record], pair: Pair) -> Pairs:
    """Numerators and denominators of every question that the full cache was asked too."""
    out: Pairs = defaultdict(list)
    for record in cell:
        truth = full.get(_asked(record))
        if truth is not None and not truth.failed:
            out[record.sample].append(pair(record, truth))
    return out


def _compared(model: str, budget: str, groups: dict[str, list[list[Record]]]) -> Iterator[Versus]:
    for first, cells in groups.items():
        for second, others in groups.items():
            if first != second:
                difference = paired(cells, others)
                if difference is not None:
                    yield Versus(model, budget, first, second, difference, difference.apart)


def paired(cells: Sequence[Sequence[Record]], others: Sequence[Sequence[Record]]) -> Interval | None:
    """Mean over tasks of score − the other's score, over the questions that both were asked. Raises InputError if a question
    that should be the same is not."""
    known = {record.key._replace(method="", budget=""): record for cell in others for record in cell}
    groups = []
    for cell in cells:
        clusters: Pairs = defaultdict(list)
        for record in cell:
            other = known.get(record.key._replace(method="", budget=""))
            if other is not None and not (record.failed and other.failed):
                if other.prompt != record.prompt and other.prompt and record.prompt:
                    raise InputError(
                        f"sample {record.sample} of {record.task} is not the same in both runs: they are not pairs (another "
                        "haystack, seed or version of the tasks)"
                    )
                clusters[record.sample].append((record.score - other.score, 1.0))
        groups.append(list(clusters.values()))
    return combined(groups, DIFFERENCE)


def by_method(records: Iterable[Record]) -> dict[tuple[str, str, str], list[list[Record]]]:
    """For every (model, method, budget) the records of each task and length."""
    cells: dict[tuple[str, str, str], dict[tuple[str, int], list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in sorted(records, key=lambda record: record.key):
        cells[record.model, record.method, record.budget][record.task, record.length].append(record)
    return {key: list(groups.values()) for key, groups in cells.items()}


def write(folder: Path, summary: Summary) -> None:
    """summary.json in the run's folder."""
    (folder / FILE).write_text(summary.text(), encoding="utf-8")
