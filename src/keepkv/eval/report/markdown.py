"""A report as Markdown tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean

from keepkv.budget import Budget
from keepkv.eval.records import Record
from keepkv.eval.report.cells import COLUMNS, cells, informative_columns
from keepkv.eval.report.worst import SHOWN, file_of, worst
from keepkv.eval.summary import ALL, FULL, Summary, SummaryRow

HEAD = ("model", "task", "tokens", *COLUMNS[1:], "KL")


def markdown_report(records: Sequence[Record], summary: Summary, settings: Mapping[str, str]) -> str:
    """A whole report: over all tasks, per task, differences, times, worst answers, settings.

    Args:
        records: Of one run or of several.
        summary: Of the same records.
        settings: The settings of every run, as TOML, by its name.
    """
    overall = [row for row in summary.rows if row.task == ALL]
    per_task = [row for row in summary.rows if row.task != ALL]
    parts = [
        "# Evaluation\n\nRetained: the share of the full cache's scores that the method keeps, Σ min(score, full's) / "
        "Σ full's. Of full: bytes stored, as a share of the full cache's. In brackets: bootstrap intervals over texts, "
        "nominally 95% (with few texts they cover about 90%). What failed counts as wrong. Rank: one more than the number of "
        "methods that are better beyond the interval of the paired difference.",
        f"## Over all tasks\n\n{_table(*informative_columns(HEAD, table_rows(overall)))}",
        "\n".join(f"* {line}" for line in versus_lines(summary)),
        f"## Retained per task\n\n{retained(summary)}",
        f"## All numbers\n\n{_table(*informative_columns(HEAD, table_rows(per_task)))}",
        f"## Seconds\n\nMeans over texts. They depend on the machine and its load.\n\n{_seconds(records)}",
        f"## Worst answers\n\n{SHOWN}\n\n{_worst(records)}",
        *(f"## Settings: {name}\n\n```toml\n{text}```" for name, text in settings.items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table_rows(rows: Sequence[SummaryRow]) -> list[list[str]]:
    """The words of every row, one for each column of HEAD."""
    lines = []
    for row in rows:
        model, budget, method, rank, *rest = cells(row)
        length = f"{row.length:,}" if row.length else ""
        rank = rank if row.task == ALL else ""  # ranks are over all tasks
        kl = f"{row.measures['kl']:.4f}" if "kl" in row.measures else ""
        lines.append([model, row.task, length, budget, method, rank, *rest, kl])
    return lines


def retained(summary: Summary) -> str:
    """The retained share: a row for every task, a column for every method at every budget."""
    columns = list(dict.fromkeys((row.budget, row.method) for row in summary.rows if row.method != FULL and row.task == ALL))
    columns.sort(key=lambda pair: (_size(pair[0]), pair[1] != "keepkv", pair[1]))
    by_key = {(row.model, row.task, row.length, row.budget, row.method): row for row in summary.rows}
    lines = []
    for model, task, length in dict.fromkeys((row.model, row.task, row.length) for row in summary.rows):
        full = by_key.get((model, task, length, "100%", FULL))
        line = [
            model,
            f"**{task}**" if task == ALL else task,
            f"{length:,}" if length else "",
            f"{full.full:.2f}" if full else "",
        ]
        for budget, method in columns:
            row = by_key.get((model, task, length, budget, method))
            interval = row.retained if row else None
            line.append(f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]" if interval else "–")
        lines.append(line)
    head = ["model", "task", "tokens", "full's score", *(f"{method}, {budget}" for budget, method in columns)]
    return _table(*informative_columns(head, lines))


def _size(budget: str) -> tuple[bool, float]:
    """Sorts budgets: shares first, the largest first."""
    parsed = Budget.parse(budget)
    return parsed.kind != "fraction", -parsed.amount


def versus_lines(summary: Summary) -> list[str]:
    """Paired differences of methods at one budget, in words."""
    not_significant = ", not significant (the interval includes 0)"
    return [
        f"{v.first} − {v.second} at {v.budget}: {v.difference}{'' if v.apart else not_significant}"
        for v in summary.versus
        if v.budget != "100%"
    ]


def _seconds(records: Sequence[Record]) -> str:
    seconds: dict[tuple[str, str, int], list[dict[str, float]]] = defaultdict(list)
    for record in records:
        if not record.failed:
            seconds[record.method, record.budget, record.length].append(record.seconds)
    names = ("read", "repeat", "compress", "answer")
    lines = []
    for (method, budget, length), of_records in sorted(seconds.items()):
        means = (fmean(times.get(name, 0.0) for times in of_records) for name in names)
        lines.append([method, budget, f"{length:,}", *(f"{mean:.2f}" for mean in means)])
    return _table(["method", "budget", "tokens", "reading", "repeating", "compressing", "a question"], lines)


def _worst(records: Sequence[Record]) -> str:
    return "\n".join(
        f"* [{record.task} {record.sample}]({file_of(record)}), {record.method} at {record.budget}: {record.ask!r}; expected "
        f"{record.expected!r}, answered {(record.failed or record.answer)!r} (full cache: {full.answer!r})"
        for record, full in worst(records)
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
