"""A report as Markdown tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean

from keepkv.eval.records import Record
from keepkv.eval.report.cells import cells
from keepkv.eval.report.worst import SHOWN, file_of, worst
from keepkv.eval.summary import ALL, FULL, Row, Summary

HEAD = (
    "model", "task", "tokens", "budget", "method", "rank", "score", "retained", "to full", "kept", "of full", "asked", "failed",
    "KL",
)  # fmt: skip


def report(records: Sequence[Record], summary: Summary, settings: Mapping[str, str]) -> str:
    """The whole text: over all tasks, per task, differences, times, worst answers, settings."""
    overall, tasks = ([row for row in summary.rows if (row.task == ALL) == whole] for whole in (True, False))
    parts = [
        "# Evaluation\n\nRetained: what is left of the full cache's scores, Σ min(score, full's) / Σ full's. Of full: bytes "
        "really stored, as a share of the full cache's. In brackets: bootstrap intervals over texts, nominally 95% "
        "(with few texts they cover about 90%). What failed counts as wrong. Rank: one more than the number of methods that "
        "are better beyond the interval of the paired difference.",
        f"## Over all tasks\n\n{_table(*informing(HEAD, table_rows(overall)))}",
        "\n".join(f"* {line}" for line in versus_lines(summary)),
        f"## Retained per task\n\n{retained(summary)}",
        f"## All numbers\n\n{_table(*informing(HEAD, table_rows(tasks)))}",
        f"## Seconds\n\nMeans over texts; they depend on the machine and on what else it did.\n\n{_seconds(records)}",
        f"## Worst answers\n\n{SHOWN}\n\n{_worst(records)}",
        *(f"## Settings: {name}\n\n```toml\n{text}```" for name, text in settings.items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table_rows(rows: Sequence[Row]) -> list[list[str]]:
    """The words of a row, as HEAD names them."""
    out = []
    for row in rows:
        model, budget, method, *rest = cells(row)
        kl = f"{row.measures['kl']:.4f}" if "kl" in row.measures else ""
        out.append([model, row.task, f"{row.length:,}" if row.length else "", budget, method, *rest, kl])
        if row.task != ALL:
            out[-1][5] = ""  # ranks are over all tasks
    return out


def informing(head: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The table without columns that are empty, and without the model or the task where there is only one."""
    keep = [
        i for i, name in enumerate(head)
        if any(row[i] for row in rows) and not (name in ("model", "task") and len({row[i] for row in rows}) == 1)
    ]  # fmt: skip
    return [head[i] for i in keep], [[row[i] for i in keep] for row in rows]


def retained(summary: Summary) -> str:
    """Tasks × (method at budget): the README's table."""
    columns = list(dict.fromkeys((row.budget, row.method) for row in summary.rows if row.method != FULL and row.task == ALL))
    columns.sort(key=lambda pair: (_size(pair[0]), pair[1] != "keepkv", pair[1]))
    found = {(row.model, row.task, row.length, row.budget, row.method): row for row in summary.rows}
    lines = []
    for model, task, length in dict.fromkeys((row.model, row.task, row.length) for row in summary.rows):
        full = found.get((model, task, length, "100%", FULL))
        line = [
            model,
            f"**{task}**" if task == ALL else task,
            f"{length:,}" if length else "",
            f"{full.full:.2f}" if full else "",
        ]
        for budget, method in columns:
            row = found.get((model, task, length, budget, method))
            line.append(
                f"{row.retained.value:.2f} [{row.retained.low:.2f}, {row.retained.high:.2f}]" if row and row.retained else "–"
            )
        lines.append(line)
    head = ["model", "task", "tokens", "full's score", *(f"{method}, {budget}" for budget, method in columns)]
    return _table(*informing(head, lines))


def _size(budget: str) -> tuple[bool, float]:
    from keepkv.budget import Budget

    parsed = Budget.parse(budget)
    return parsed.kind != "fraction", -parsed.amount


def versus_lines(summary: Summary) -> list[str]:
    """Paired differences of methods at one budget, in words."""
    return [
        f"{v.first} − {v.second} at {v.budget}: {v.difference}{'' if v.apart else ', which includes 0: not told apart'}"
        for v in summary.versus
        if v.budget != "100%"
    ]


def _seconds(records: Sequence[Record]) -> str:
    spent: dict[tuple[str, str, int], list[dict[str, float]]] = defaultdict(list)
    for record in records:
        if not record.failed:
            spent[record.method, record.budget, record.length].append(record.seconds)
    names = ("read", "repeat", "compress", "answer")
    lines = [
        [method, budget, f"{length:,}", *(f"{fmean(each.get(name, 0.0) for each in found):.2f}" for name in names)]
        for (method, budget, length), found in sorted(spent.items())
    ]
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
