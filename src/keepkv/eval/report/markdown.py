"""A report as Markdown tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from keepkv.eval.records import Record
from keepkv.eval.report.cells import (
    COLUMNS,
    UNDECIDED_NOTE,
    by_model,
    cells,
    informative_columns,
    is_undecided,
    left_out_lines,
    ratio_lines,
    versus_lines,
)
from keepkv.eval.report.worst import SHOWN, file_of, variant_of, worst
from keepkv.eval.summary import ALL, Summary, SummaryRow, by_size

HEAD = ("task", "tokens", *COLUMNS)
WIDEST = 8  # columns of variants; more of them are rows
EXPLAINED = (
    "Kept right: of the answers that the full cache gets right, the share that stays right. Loss: how much less likely a "
    "token of the right answer became, in nats. KL: of the next tokens, from the full cache's. Retained: the share of the full "
    "cache's scores that the method keeps, Σ min(score, full's) / Σ full's. Of full: bytes stored, as a share of the full "
    "cache's. In brackets: bootstrap intervals over texts, nominally 95% (with few texts they cover about 90%). What failed "
    "counts as wrong. Rank: one more than the number of methods that are better beyond the interval of the paired difference."
)
LEFT_OUT = "Tasks that are left out, since the full cache scores less than guessing + 0.1:"


def markdown_report(records: Sequence[Record], summary: Summary, settings: Mapping[str, str]) -> str:
    """A whole report: over all tasks, per task, differences, times, worst answers, settings.

    Args:
        records: Of one run or of several.
        summary: Of the same records.
        settings: The settings of every run, as TOML, by its name.
    """
    out = left_out_lines(summary)
    parts = [
        f"# Evaluation\n\n{EXPLAINED}",
        f"## Over all tasks\n\n{_tables(summary, lambda row: row.task == ALL)}",
        UNDECIDED_NOTE if is_undecided(summary.rows) else "",
        f"{LEFT_OUT}\n\n{_list(out)}" if out else "",
        _list([*versus_lines(summary), *ratio_lines(summary)]),
        f"## Retained per task\n\n{retained(summary)}",
        f"## All numbers\n\n{_tables(summary, lambda row: row.task != ALL and not row.left_out)}",
        f"## Seconds\n\nMeans over texts. They depend on the machine and its load.\n\n{_seconds(records)}",
        f"## Worst answers\n\n{SHOWN}\n\n{_worst(records)}",
        *(f"## Settings: {name}\n\n```toml\n{text}```" for name, text in settings.items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)


def _tables(summary: Summary, wanted: Callable[[SummaryRow], bool]) -> str:
    """A table for every model, with its name if there are several."""
    tables = [(name, [row for row in rows if wanted(row)]) for name, rows in by_model(summary)]
    tables = [(name, rows) for name, rows in tables if rows]
    if not tables:
        return "None."
    texts = [_table(*informative_columns(HEAD, table_rows(rows))) for _, rows in tables]
    return _with_names([name for name, _ in tables], texts)


def _with_names(names: Sequence[str], texts: Sequence[str]) -> str:
    if len(names) == 1:
        return texts[0]
    return "\n\n".join(f"### {name}\n\n{text}" for name, text in zip(names, texts, strict=True))


def table_rows(rows: Sequence[SummaryRow]) -> list[list[str]]:
    """The words of every row, one for each column of HEAD."""
    return [[row.task, f"{row.length:,}" if row.length else "", *cells(row)] for row in rows]


def retained(summary: Summary) -> str:
    """The retained share of every model: a row for every task, a column for every variant, or the other way round."""
    tables = [(name, _retained([row for row in rows if not row.left_out])) for name, rows in by_model(summary)]
    return _with_names(*zip(*tables, strict=True))


def _retained(rows: Sequence[SummaryRow]) -> str:
    variants = sorted(
        {(row.budget, row.slot_dtype, row.method) for row in rows if not row.is_full},
        key=lambda v: (by_size(v[0]), v[1] != "float", v[1], v[2] != "keepkv", v[2]),
    )
    tasks = sorted({(row.task, row.length) for row in rows}, key=lambda place: (place[0] == ALL, place))
    by_key = {(row.task, row.length, row.budget, row.slot_dtype, row.method): row for row in rows}
    full = {(row.task, row.length): f"{row.score.value:.2f}" for row in rows if row.is_full and row.score}

    def cell(place: tuple[str, int], variant: tuple[str, str, str]) -> str:
        row = by_key.get((*place, *variant))
        interval = row.retained if row else None
        return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]" if interval else "–"

    names = [f"{method}, {f'{budget} {slots}'.removesuffix(' float')}" for budget, slots, method in variants]
    if len(variants) <= WIDEST:
        head = ["task", "tokens", "full's score", *names]
        lines = [
            [f"**{task}**" if task == ALL else task, f"{length:,}" if length else "", full.get((task, length), "")]
            + [cell((task, length), variant) for variant in variants]
            for task, length in tasks
        ]
        return _table(*informative_columns(head, lines))
    head = ["variant", *(f"{task}, {length:,}" if length else task for task, length in tasks)]
    lines = [["full's score", *(full.get(place, "") for place in tasks)]]
    lines += [[name, *(cell(place, v) for place in tasks)] for name, v in zip(names, variants, strict=True)]
    return _table(head, lines)


def _seconds(records: Sequence[Record]) -> str:
    seconds: dict[tuple[str, str, str, str, str, int], list[dict[str, float]]] = defaultdict(list)
    for record in records:
        if not record.failed:
            key = (record.model, record.dtype, record.method, record.budget, record.slot_dtype, record.length)
            seconds[key].append(record.seconds)
    models = {key[0] for key in seconds}
    dtypes = {key[1] for key in seconds}
    names = ("read", "repeat", "compress", "answer")
    lines = []
    for (model, dtype, method, budget, slots, length), of_records in sorted(seconds.items(), key=lambda item: item[0]):
        means = (fmean(times.get(name, 0.0) for times in of_records) for name in names)
        place = [model if len(models) > 1 else "", dtype if len(dtypes) > 1 else ""]
        lines.append(
            [*place, method, f"{budget} {slots}".removesuffix(" float"), f"{length:,}", *(f"{mean:.2f}" for mean in means)]
        )
    head = ["model", "dtype", "method", "budget", "tokens", "reading", "repeating", "compressing", "a question"]
    return _table(*informative_columns(head, lines))


def _worst(records: Sequence[Record]) -> str:
    return "\n".join(
        f"* [{record.task} {record.sample}]({file_of(record)}), {variant_of(record)}: {record.ask!r}; expected "
        f"{record.expected!r}, answered {(record.failed or record.answer)!r} (full cache: {full.answer!r})"
        for record, full in worst(records)
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
