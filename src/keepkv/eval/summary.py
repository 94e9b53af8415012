"""From records to numbers: no timings, sorted, so that a run that was interrupted ends with the same bytes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean

from keepkv.budget import Budget
from keepkv.errors import InputError
from keepkv.eval.bootstrap import DIFFERENCE, Interval, combined, ranks, ratio_of_means
from keepkv.eval.records import Record, RecordKey
from keepkv.paths import write_file

FILE = "summary.json"
ALL = "all tasks"
FULL = "full"
ENOUGH_QUESTIONS = 100  # that the full cache gets right: fewer cannot decide between 90 and 98%
ENOUGH_TEXTS = 20
ENOUGH_RATIO_TEXTS = 8  # of a ratio of means
ABOVE_GUESSING = 0.1  # by which the full cache must be better on a task that says something
DIVERGENCE = "kl"  # the measure of which ratios are taken
Ratio = Callable[[Record, Record], tuple[float, float]]  # (a record, the full cache's) -> numerator and denominator
RatiosByText = dict[Hashable, list[tuple[float, float]]]  # of every text: numerator and denominator of every question
Cells = Sequence[Sequence[Record]]  # the records of each task and length


@dataclass(frozen=True)
class SummaryRow:
    """One variant on one task and length, or over all tasks (then means over tasks and lengths).

    Args:
        model: The model.
        dtype: The model's own dtype.
        task: The task's name, or ALL.
        length: The texts' length in tokens; 0 over all tasks, and for tasks with texts of their own.
        budget: The budget in words.
        slot_dtype: How slots are stored.
        method: The method's name, or a rival's.
        samples: Number of texts.
        questions: Number of questions.
        failed: Questions without an answer; they count as score 0.
        score: Mean score.
        full: Mean score of the full cache.
        kept: Of the questions that the full cache gets right (score 1), the share that stays right (score 1).
        kept_questions: How many questions the full cache gets right.
        kept_texts: Of how many texts they are.
        decides: Whether these are at least ENOUGH_QUESTIONS of ENOUGH_TEXTS.
        retained: Σ min(score, full's score) / Σ full's score, over the questions.
        lead: Mean of score − full's score, question by question.
        loss: How much less likely a token of the right answer became, in nats.
        kv_bytes: Mean bytes of a cache.
        share: Mean share of the full cache's bytes.
        rank: 1 + the number of methods at this budget and slot dtype that are significantly better; 0 on a single task.
        measures: Means of the task's further measures.
        left_out: Whether this task is left out of what is over all tasks (see `LeftOut`).
    """

    model: str
    dtype: str
    task: str
    length: int
    budget: str
    slot_dtype: str
    method: str
    samples: int
    questions: int
    failed: int
    score: Interval | None
    full: float
    kept: Interval | None
    kept_questions: int
    kept_texts: int
    decides: bool
    retained: Interval | None
    lead: Interval | None
    loss: Interval | None
    kv_bytes: int
    share: float
    rank: int
    measures: dict[str, float]
    left_out: bool = False

    @property
    def is_full(self) -> bool:
        """Whether this is the full cache, which everything is compared with."""
        return (self.method, self.slot_dtype) == (FULL, "float")

    @property
    def budget_and_slots(self) -> str:
        """The budget, and how slots are stored where that is not the model's dtype."""
        return f"{self.budget} {self.slot_dtype}".removesuffix(" float")


@dataclass(frozen=True)
class Versus:
    """The paired difference in score of two methods at one budget over all tasks; apart: its interval excludes 0."""

    model: str
    dtype: str
    budget: str
    slot_dtype: str
    first: str
    second: str
    difference: Interval
    apart: bool


@dataclass(frozen=True)
class DivergenceRatio:
    """Mean KL of the first method / mean KL of the second on one task; apart: its interval excludes 1."""

    model: str
    dtype: str
    task: str
    length: int
    budget: str
    slot_dtype: str
    first: str
    second: str
    ratio: Interval
    texts: int
    apart: bool


@dataclass(frozen=True)
class LeftOut:
    """A task that says nothing of a model: its full cache scores less than guessing + ABOVE_GUESSING.

    Args:
        model: The model.
        dtype: Its dtype.
        task: The task's name.
        length: The texts' length in tokens.
        full: Mean score of the full cache.
        guessing: What guessing gets: 1 / number of answers to choose from, 0 where the answer is written.
        questions: Number of questions.
    """

    model: str
    dtype: str
    task: str
    length: int
    full: float
    guessing: float
    questions: int


@dataclass(frozen=True)
class Summary:
    """All numbers of a run: rows per task and over all tasks, differences and ratios of methods, tasks that say nothing."""

    rows: tuple[SummaryRow, ...]
    versus: tuple[Versus, ...]
    ratios: tuple[DivergenceRatio, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n"


def summarize(records: Iterable[Record]) -> Summary:
    """Summarizes the records of a run, or of several.

    Raises:
        InputError: if the full cache has no records, so that there is nothing to compare with.
    """
    in_order = sorted(records, key=lambda record: record.key)
    full = full_records(in_order)
    if not full:
        raise InputError("there are no records of the full cache, so that nothing can be compared: let the run finish first")
    left_out = tasks_left_out(full)
    cells: dict[tuple[str, str, str, int, str, str, str], list[Record]] = defaultdict(list)
    for record in in_order:
        key = (record.model, record.dtype, record.task, record.length, record.budget, record.slot_dtype, record.method)
        cells[key].append(record)
    rows = [_row(key, [cell], full, left_out=key[:4] in left_out) for key, cell in cells.items()]
    groups: dict[tuple[str, str, str, str], dict[str, dict[tuple[str, int], list[Record]]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for (model, dtype, task, length, budget, slot_dtype, method), cell in cells.items():
        if (model, dtype, task, length) not in left_out:
            groups[model, dtype, budget, slot_dtype][method][task, length] = cell
    versus: list[Versus] = []
    ratios: list[DivergenceRatio] = []
    for variant in sorted(groups, key=lambda key: (key[:2], by_size(key[2]), key[3])):
        model, dtype, budget, slot_dtype = variant
        methods = groups[variant]
        differences: dict[tuple[str, str], Interval] = {}
        for first, second in combinations(sorted(methods), 2):
            difference = paired(list(methods[first].values()), list(methods[second].values()))
            if difference is not None:
                differences[first, second], differences[second, first] = difference, difference.mirrored
                versus.append(Versus(*variant, first, second, difference, difference.apart))
            for task, length in sorted(methods[first].keys() & methods[second].keys()):
                texts = divergences(methods[first][task, length], methods[second][task, length])
                ratio = ratio_of_means([texts])
                if ratio is not None:
                    apart = ratio.low > 1 or ratio.high < 1
                    ratios.append(
                        DivergenceRatio(model, dtype, task, length, budget, slot_dtype, first, second, ratio, len(texts), apart)
                    )
        order = ranks(sorted(methods), differences)
        for method in sorted(methods):
            of_method = list(methods[method].values())
            rows.append(_row((model, dtype, ALL, 0, budget, slot_dtype, method), of_method, full, order[method]))
    return Summary(tuple(rows), tuple(versus), tuple(ratios), tuple(left_out.values()))


def full_records(records: Iterable[Record]) -> dict[RecordKey, Record]:
    """The records of the full cache by `full_key`."""
    return {full_key(record): record for record in records if (record.method, record.slot_dtype) == (FULL, "float")}


def full_key(record: Record) -> RecordKey:
    """The key of the full cache's record of the same question, without its variant."""
    return record.asked


def by_size(budget: str) -> tuple[bool, float]:
    """Sorts budgets: shares first, the largest first."""
    parsed = Budget.parse(budget)
    return parsed.kind != "fraction", -parsed.amount


def tasks_left_out(full: Mapping[RecordKey, Record]) -> dict[tuple[str, str, str, int], LeftOut]:
    """The tasks that say nothing of a model, by (model, dtype, task, length)."""
    cells: dict[tuple[str, str, str, int], list[Record]] = defaultdict(list)
    for record in full.values():
        cells[record.model, record.dtype, record.task, record.length].append(record)
    left_out = {}
    for key, cell in cells.items():
        score = fmean(record.score for record in cell)
        guessing = fmean(1 / len(record.chances) if len(record.chances) > 1 else 0.0 for record in cell)
        if score < guessing + ABOVE_GUESSING:
            left_out[key] = LeftOut(*key, round(score, 6), round(guessing, 6), len(cell))
    return left_out


def _row(
    key: tuple[str, str, str, int, str, str, str],
    cells: Cells,
    full: Mapping[RecordKey, Record],
    rank: int = 0,
    left_out: bool = False,
) -> SummaryRow:
    model, dtype, task, length, budget, slot_dtype, method = key
    records = [record for cell in cells for record in cell]
    answered = [record for record in records if not record.failed]
    pairs = [(record, full[full_key(record)]) for record in records if full_key(record) in full]

    def over(ratio: Ratio, limits: tuple[float, float] | None = (0.0, 1.0)) -> Interval | None:
        return combined([_by_text(cell, full, ratio) for cell in cells], limits)

    if (method, slot_dtype) == (FULL, "float"):
        retained: Interval | None = Interval(1.0, 1.0, 1.0)
        kept: Interval | None = None
    else:
        retained = over(lambda record, truth: (min(record.score, truth.score), truth.score))
        kept = over(_stays_right)
    right = [record for record, truth in pairs if _stays_right(record, truth)[1]]
    texts = {record.group for record in right}
    shares = [record.kv_bytes / max(1, record.kv_bytes_full) for record in answered]
    return SummaryRow(
        model=model,
        dtype=dtype,
        task=task,
        length=length,
        budget=budget,
        slot_dtype=slot_dtype,
        method=method,
        samples=len({record.group for record in records}),
        questions=len(records),
        failed=len(records) - len(answered),
        score=over(lambda record, truth: (record.score, 1.0)),
        full=round(fmean(truth.score for _, truth in pairs), 6) if pairs else 0.0,
        kept=kept,
        kept_questions=len(right),
        kept_texts=len(texts),
        decides=len(right) >= ENOUGH_QUESTIONS and len(texts) >= ENOUGH_TEXTS,
        retained=retained,
        lead=over(lambda record, truth: (record.score - truth.score, 1.0), DIFFERENCE),
        loss=over(_lost, None),
        kv_bytes=round(fmean(record.kv_bytes for record in answered)) if answered else 0,
        share=round(fmean(shares), 6) if shares else 0.0,
        rank=rank,
        measures=_measures(cells),
        left_out=left_out,
    )


def _measures(cells: Cells) -> dict[str, float]:
    """Means over the tasks that have a measure of their means, by name."""
    means: dict[str, list[float]] = defaultdict(list)
    for cell in cells:
        answered = [record for record in cell if not record.failed]
        for name in set.intersection(*(set(record.measures) for record in answered)) if answered else ():
            means[name].append(fmean(record.measures[name] for record in answered))
    return {name: round(fmean(values), 6) for name, values in sorted(means.items())}


def _stays_right(record: Record, truth: Record) -> tuple[float, float]:
    """Of an answer that the full cache gets right, whether it stays right. A continuation has no answer."""
    right = bool(record.ask) and not truth.failed and truth.score >= 1
    return float(right and record.score >= 1), float(right)


def _lost(record: Record, truth: Record) -> tuple[float, float]:
    """How much less likely a token of the right answer became, in nats."""
    if record.failed or record.loglik is None or truth.loglik is None:
        return 0.0, 0.0
    return truth.loglik - record.loglik, 1.0


def _by_text(cell: Sequence[Record], full: Mapping[RecordKey, Record], ratio: Ratio) -> RatiosByText:
    """Numerators and denominators of every question that the full cache was asked too."""
    ratios: RatiosByText = defaultdict(list)
    for record in cell:
        truth = full.get(full_key(record))
        if truth is not None and not truth.failed:
            ratios[text_of(record)].append(ratio(record, truth))
    return ratios


def text_of(record: Record) -> Hashable:
    """What text a question was asked of: two tasks may have the same one. In older records, no two have."""
    return record.text or (record.task, record.length, record.sample)


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
    others = {record.asked: record for cell in other_cells for record in cell}
    groups = []
    for cell in cells:
        ratios: RatiosByText = defaultdict(list)
        for record in cell:
            other = others.get(record.asked)
            if other is not None and not (record.failed and other.failed):
                if other.prompt != record.prompt and other.prompt and record.prompt:
                    raise InputError(
                        f"sample {record.sample} of {record.task} is not the same in both runs, so that they are not pairs: "
                        "compare runs with the same haystack, seed and version of keepkv"
                    )
                ratios[text_of(record)].append((record.score - other.score, 1.0))
        groups.append(ratios)
    return combined(groups, DIFFERENCE)


def divergences(cell: Sequence[Record], other_cell: Sequence[Record]) -> RatiosByText:
    """For every text, the KL of two methods on one task, where both were measured; nothing on a task that has none."""
    others = {record.asked: record for record in other_cell}
    pairs: RatiosByText = defaultdict(list)
    for record in cell:
        other = others.get(record.asked)
        if other is not None and not (record.failed or other.failed) and DIVERGENCE in record.measures:
            pairs[text_of(record)].append((record.measures[DIVERGENCE], other.measures[DIVERGENCE]))
    return pairs


def by_method(records: Iterable[Record]) -> dict[tuple[str, str, str, str, str], list[list[Record]]]:
    """For every (model, dtype, method, budget, slot dtype) the records of each task and length."""
    cells: dict[tuple[str, str, str, str, str], dict[tuple[str, int], list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in sorted(records, key=lambda record: record.key):
        variant = (record.model, record.dtype, record.method, record.budget, record.slot_dtype)
        cells[variant][record.task, record.length].append(record)
    return {key: list(groups.values()) for key, groups in cells.items()}


def write_summary(folder: Path, summary: Summary) -> None:
    """summary.json in the run's folder."""
    write_file(folder / FILE, summary.text())
