"""The words in one line of a summary, for every kind of report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from keepkv.eval.summary import (
    ALL,
    ENOUGH_QUESTIONS,
    ENOUGH_RATIO_TEXTS,
    ENOUGH_TEXTS,
    Summary,
    SummaryRow,
    by_size,
)
from keepkv.render import size

COLUMNS = (
    "budget",
    "method",
    "of full",
    "rank",
    "score",
    "kept right",
    "of right answers",
    "loss",
    "KL",
    "retained",
    "vs full",
    "bytes",
    "questions",
    "failed",
)
UNDECIDED = "†"
UNDECIDED_NOTE = (
    f"{UNDECIDED} fewer than {ENOUGH_QUESTIONS} questions of {ENOUGH_TEXTS} texts that the full cache gets right: "
    "cannot decide between 90 and 98%."
)
MOST_COMPARED = 4  # with more methods at a budget, each is compared with the best one only


def cells(row: SummaryRow) -> list[str]:
    """The words of a row, one for each of COLUMNS."""
    return [
        row.budget_and_slots,
        row.method,
        f"{row.share:.1%}",
        "" if row.is_full or row.task != ALL else f"{row.rank}",  # ranks are over all tasks
        str(row.score or "–"),
        kept(row),
        f"{row.kept_questions:,} in {row.kept_texts:,} texts" if row.kept else "",
        f"{row.loss.value:.3f}" if row.loss and not row.is_full else "",
        f"{row.measures['kl']:.4f}" if "kl" in row.measures else "",
        "" if row.is_full else str(row.retained or "–"),
        "" if row.is_full or row.lead is None else f"{row.lead.value:+.3f}",
        size(row.kv_bytes),
        f"{row.questions}",
        f"{row.failed or ''}",
    ]


def kept(row: SummaryRow, digits: int = 3) -> str:
    """How many of the full cache's right answers stay right, with the mark where that cannot decide."""
    if row.kept is None:
        return ""
    value, low, high = (f"{x:.{digits}f}" for x in row.kept)
    return f"{value} [{low}, {high}]{'' if row.decides else UNDECIDED}"


def is_undecided(rows: Iterable[SummaryRow]) -> bool:
    """Whether a row has the mark, so that it must be explained."""
    return any(row.kept is not None and not row.decides for row in rows)


def by_model(summary: Summary) -> Iterator[tuple[str, list[SummaryRow]]]:
    """The rows of every model in the order in which they are read, under its name, with its dtype if there are several."""
    units = {(row.model, row.dtype) for row in summary.rows}
    several = {model for model, _ in units if sum(other == model for other, _ in units) > 1}
    for (model, dtype), rows in groupby(sorted(summary.rows, key=_order), key=lambda row: (row.model, row.dtype)):
        yield title(model, dtype, several), list(rows)


def title(model: str, dtype: str, several: Iterable[str]) -> str:
    """A model's name, with its dtype if there are several."""
    return f"{model}, {dtype}" if model in several else model


def _order(row: SummaryRow) -> tuple[object, ...]:
    best = -row.score.value if row.score else 0.0
    of_task = (row.task, row.length) if row.task != ALL else ("", 0)
    return (
        row.model,
        row.dtype,
        of_task,
        by_size(row.budget),
        row.slot_dtype != "float",
        row.slot_dtype,
        row.rank,
        best,
        row.method,
    )


def informative_columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The table without columns that are empty, and without the task where there is only one."""

    def informs(i: int) -> bool:
        values = {row[i] for row in rows}
        return any(values) and not (head[i] == "task" and len(values) == 1)

    columns = [i for i in range(len(head)) if informs(i)]
    return [head[i] for i in columns], [[row[i] for i in columns] for row in rows]


def left_out_lines(summary: Summary) -> list[str]:
    """The tasks that say nothing of a model, in words."""
    return [
        f"{each.model}{f', {each.dtype}' if each.dtype != 'float32' else ''}: {each.task}"
        f"{f', {each.length:,} tokens' if each.length else ''}: the full cache scores {each.full:.2f}, "
        f"guessing {each.guessing:.2f} ({each.questions} questions)"
        for each in summary.left_out
    ]


def versus_lines(summary: Summary) -> list[str]:
    """Paired differences of methods at one budget, in words; of many methods, only those to the best one."""
    lines = []
    for (model, dtype, budget, slot_dtype), group in groupby(
        summary.versus, key=lambda v: (v.model, v.dtype, v.budget, v.slot_dtype)
    ):
        pairs = list(group)
        names = {name for pair in pairs for name in (pair.first, pair.second)}
        scores = {
            row.method: row.score.value
            for row in summary.rows
            if row.task == ALL
            and (row.model, row.dtype, row.budget, row.slot_dtype) == (model, dtype, budget, slot_dtype)
            and row.score
        }
        best = max(sorted(scores), key=lambda name: scores[name], default="")
        for pair in pairs:
            if len(names) <= MOST_COMPARED or best in (pair.first, pair.second):
                first, second, difference = pair.first, pair.second, pair.difference
                if len(names) > MOST_COMPARED and second == best:
                    first, second, difference = second, first, difference.mirrored
                remark = "" if pair.apart else ", not significant (the interval includes 0)"
                place = _place(summary, model, dtype, budget, slot_dtype)
                lines.append(f"{first} − {second} at {place}: {difference}{remark}")
    return lines


def ratio_lines(summary: Summary) -> list[str]:
    """Ratios of mean KL at one budget, in words; of many methods, only those to the best one."""
    lines = []
    for key, group in groupby(summary.ratios, key=lambda r: (r.model, r.dtype, r.task, r.length, r.budget, r.slot_dtype)):
        model, dtype, task, length, budget, slot_dtype = key
        pairs = list(group)
        names = {name for pair in pairs for name in (pair.first, pair.second)}
        means = {
            row.method: row.measures["kl"]
            for row in summary.rows
            if (row.model, row.dtype, row.task, row.length, row.budget, row.slot_dtype) == key and "kl" in row.measures
        }
        best = min(sorted(means), key=lambda name: means[name], default="")
        for pair in pairs:
            if len(names) <= MOST_COMPARED or best in (pair.first, pair.second):
                remark = "" if pair.apart else ", not significant (the interval includes 1)"
                few = f", {UNDECIDED} fewer than {ENOUGH_RATIO_TEXTS} texts" if pair.texts < ENOUGH_RATIO_TEXTS else ""
                place = _place(summary, model, dtype, budget, slot_dtype)
                size = f", {length:,} tokens" if length else ""
                lines.append(
                    f"KL of {pair.first} / KL of {pair.second} at {place}, {task}{size}: {pair.ratio}, "
                    f"{pair.texts} texts{remark}{few}"
                )
    return lines


def _place(summary: Summary, model: str, dtype: str, budget: str, slot_dtype: str) -> str:
    """The budget, the slot dtype if it is not the model's, and the model if there are several."""
    units = {(row.model, row.dtype) for row in summary.rows}
    several = {name for name, _ in units if sum(other == name for other, _ in units) > 1}
    of_model = f", {title(model, dtype, several)}" if len(units) > 1 else ""
    return f"{budget} {slot_dtype}".removesuffix(" float") + of_model
