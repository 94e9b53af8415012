"""From records to numbers: no timings, sorted, so that a run that was interrupted ends with the same bytes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from keepkv.errors import InputError
from keepkv.eval.bootstrap import DIFFERENCE, Interval, combined, ranks
from keepkv.eval.records import Record, RecordKey

FILE = "summary.json"
ALL = "all tasks"
FULL = "full"
Ratio = Callable[[Record, Record], tuple[float, float]]  # (a record, the full cache's) -> numerator and denominator
RatiosBySample = dict[int, list[tuple[float, float]]]  # of every sample: numerator and denominator of every question
Cells = Sequence[Sequence[Record]]  # the records of each task and length


@dataclass(frozen=True)
class SummaryRow:
    """One method at one budget on one task and length, or over all tasks (then means over tasks and lengths).

    Args:
        model: The model.
        task: The task's name, or ALL.
        length: The texts' length in tokens; 0 over all tasks, and for tasks with texts of their own.
        budget: The budget in words.
        method: The method's name.
        samples: Number of texts.
        questions: Number of questions.
        failed: Questions without an answer; they count as score 0.
        score: Mean score.
        full: Mean score of the full cache.
        retained: Σ min(score, full's score) / Σ full's score, over the questions.
        lead: Mean of score − full's score, question by question.
        loss: How much less likely a token of the right answer became, in nats.
        kv_bytes: Mean bytes of a cache.
        share: Mean share of the full cache's bytes.
        rank: 1 + the number of methods that are significantly better; 0 on a single task.
        measures: Means of the task's further measures.
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
    """All numbers of a run: rows per task and over all tasks, and the differences between methods."""

    rows: tuple[SummaryRow, ...]
    versus: tuple[Versus, ...]

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n"


def summarize(records: Iterable[Record]) -> Summary:
    """Summarizes the records of a run, or of several.

    Raises:
        InputError: if the full cache has no records, so that there is nothing to compare with.
    """
    in_order = sorted(records, key=lambda record: record.key)
    full = {full_key(record): record for record in in_order if record.method == FULL}
    if not full:
        raise InputError("there are no records of the full cache, so that nothing can be compared: let the run finish first")
    cells: dict[tuple[str, str, int, str, str], list[Record]] = defaultdict(list)
    for record in in_order:
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


def full_key(record: Record) -> RecordKey:
    """The key of the full cache's record of the same question, without its budget."""
    return record.key._replace(method=FULL, budget="")


def _budgets(budgets: Iterable[str]) -> list[str]:
    return sorted(set(budgets), key=lambda budget: (budget == "100%", budget))


def _row(
    model: str, task: str, length: int, budget: str, method: str, cells: Cells, full: dict[RecordKey, Record], rank: int = 0
) -> SummaryRow:
    records = [record for cell in cells for record in cell]
    answered = [record for record in records if not record.failed]
    pairs = [(record, full[full_key(record)]) for record in records if full_key(record) in full]

    def over(ratio: Ratio, limits: tuple[float, float] = (0.0, 1.0)) -> Interval | None:
        return combined([list(_by_sample(cell, full, ratio).values()) for cell in cells], limits)

    if method == FULL:
        retained: Interval | None = Interval(1.0, 1.0, 1.0)
    else:
        retained = over(lambda record, truth: (min(record.score, truth.score), truth.score))
    losses = [
        truth.loglik - record.loglik
        for record, truth in pairs
        if not record.failed and record.loglik is not None and truth.loglik is not None
    ]
    shares = [record.kv_bytes / max(1, record.kv_bytes_full) for record in answered]
    measures = sorted(set.intersection(*(set(record.measures) for record in answered))) if answered else []
    return SummaryRow(
        model=model,
        task=task,
        length=length,
        budget=budget,
        method=method,
        samples=len({record.group for record in records}),
        questions=len(records),
        failed=len(records) - len(answered),
        score=over(lambda record, truth: (record.score, 1.0)),
        full=round(fmean(truth.score for _, truth in pairs), 6) if pairs else 0.0,
        retained=retained,
        lead=over(lambda record, truth: (record.score - truth.score, 1.0), DIFFERENCE),
        loss=round(fmean(losses), 6) if losses else None,
        kv_bytes=round(fmean(record.kv_bytes for record in answered)) if answered else 0,
        share=round(fmean(shares), 6) if shares else 0.0,
        rank=rank,
        measures={name: round(fmean(record.measures[name] for record in answered), 6) for name in measures},
    )


def _by_sample(cell: Sequence[Record], full: dict[RecordKey, Record], ratio: Ratio) -> RatiosBySample:
    """Numerators and denominators of every question that the full cache was asked too."""
    ratios: RatiosBySample = defaultdict(list)
    for record in cell:
        truth = full.get(full_key(record))
        if truth is not None and not truth.failed:
            ratios[record.sample].append(ratio(record, truth))
    return ratios


def _compared(model: str, budget: str, groups: dict[str, list[list[Record]]]) -> Iterator[Versus]:
    for first, cells in groups.items():
        for second, other_cells in groups.items():
            if first != second:
                difference = paired(cells, other_cells)
                if difference is not None:
                    yield Versus(model, budget, first, second, difference, difference.apart)


def paired(cells: Cells, other_cells: Cells) -> Interval | None:
    """The paired difference in score of two methods, or of one method in two runs.

    Args:
        cells: The first's records of each task and length.
        other_cells: The second's.

    Returns:
        The mean over tasks of score − the other's score, over the questions that both were asked, with its bootstrap
        interval; None if there is no such question.

    Raises:
        InputError: if a question that should be the same is not.
    """
    others = {record.key._replace(method="", budget=""): record for cell in other_cells for record in cell}
    groups = []
    for cell in cells:
        ratios: RatiosBySample = defaultdict(list)
        for record in cell:
            other = others.get(record.key._replace(method="", budget=""))
            if other is not None and not (record.failed and other.failed):
                if other.prompt != record.prompt and other.prompt and record.prompt:
                    raise InputError(
                        f"sample {record.sample} of {record.task} is not the same in both runs, so that they are not pairs: "
                        "compare runs with the same haystack, seed and version of keepkv"
                    )
                ratios[record.sample].append((record.score - other.score, 1.0))
        groups.append(list(ratios.values()))
    return combined(groups, DIFFERENCE)


def by_method(records: Iterable[Record]) -> dict[tuple[str, str, str], list[list[Record]]]:
    """For every (model, method, budget) the records of each task and length."""
    cells: dict[tuple[str, str, str], dict[tuple[str, int], list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in sorted(records, key=lambda record: record.key):
        cells[record.model, record.method, record.budget][record.task, record.length].append(record)
    return {key: list(groups.values()) for key, groups in cells.items()}


def write_summary(folder: Path, summary: Summary) -> None:
    """summary.json in the run's folder."""
    (folder / FILE).write_text(summary.text(), encoding="utf-8")
