"""A summary as a person reads it in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from keepkv.cli.progress import out
from keepkv.eval.leave_one_out import HeldOut
from keepkv.eval.report.cells import (
    COLUMNS,
    UNDECIDED_NOTE,
    by_model,
    cells,
    informative_columns,
    is_undecided,
    kept,
    left_out_lines,
    ratio_lines,
    versus_lines,
)
from keepkv.eval.report.markdown import LEFT_OUT
from keepkv.eval.summary import ALL, Summary, SummaryRow

SHOWN = ("budget", "method", "of full", "rank", "score", "kept right", "loss", "KL")  # so that it fits 80 columns


def show(result: Summary) -> None:
    """For every model one line per budget and method over all tasks, then what is left out, differences and ratios."""
    models = [(name, [row for row in rows if row.task == ALL]) for name, rows in by_model(result)]
    for name, rows in models:
        if len(models) > 1 and rows:
            out.print(f"[bold]{escape(name)}[/bold]")
        if rows:
            out.print(_table(rows))
    if is_undecided(row for _, rows in models for row in rows):
        out.print(UNDECIDED_NOTE, markup=False)
    left_out = left_out_lines(result)
    for line in [*([LEFT_OUT] if left_out else []), *left_out, *versus_lines(result), *ratio_lines(result)]:
        out.print(line, markup=False)


def _table(rows: Sequence[SummaryRow]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    lines = [dict(zip(COLUMNS, cells(row), strict=True)) for row in rows]
    for line, row in zip(lines, rows, strict=True):
        line["score"] = f"{row.score.value:.2f}" if row.score else "–"
        line["kept right"] = kept(row, digits=2)
    head, texts = informative_columns(SHOWN, [[line[name] for name in SHOWN] for line in lines])
    for name in head:
        table.add_column(name, justify="left" if name in ("budget", "method") else "right", no_wrap=True)
    for text in texts:
        table.add_row(*text)
    return table


def show_held_out(held_out: Sequence[HeldOut]) -> None:
    """For every budget and model: what was chosen on the others, what would have been best, and what the choice costs."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    dtypes = len({each.dtype for each in held_out}) > 1
    for name in ("budget", "held out", "chosen", "result", "best there", "result", "regret"):
        table.add_column(name, no_wrap=name in ("budget", "held out"))
    for each in held_out:
        digits = 3 if each.measure == "score" else 4
        intervals = [
            f"{value.value:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"
            for value in (each.result, each.best_result)
        ]
        model = f"{each.model}, {each.dtype}" if dtypes else each.model
        table.add_row(each.budget, escape(model), each.picked, intervals[0], each.best, intervals[1], str(each.regret))
    out.print(table)
    first = held_out[0]
    out.print(
        "Results are the mean score, and regret is how much more the best has."
        if first.measure == "score"
        else "Results are the mean KL, and regret is how many times more the choice has than the best."
    )


def show_tasks(rows: Sequence[dict[str, str]], title: str = "task") -> None:
    """The table of tasks, or of rivals."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("name", "summary", "source"):
        table.add_column(title if name == "name" else name, no_wrap=name == "name")
    for row in rows:
        table.add_row(*row.values())
    out.print(table)
