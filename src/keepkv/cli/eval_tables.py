"""A summary as a person reads it in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from keepkv.cli.progress import out
from keepkv.eval.report.cells import COLUMNS, cells, informative_columns
from keepkv.eval.summary import ALL, Summary


def show(result: Summary) -> None:
    """One line per budget and method over all tasks, then the paired differences between methods."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    head, lines = informative_columns(COLUMNS, [cells(row) for row in result.rows if row.task == ALL])
    columns = [i for i, name in enumerate(head) if name not in ("score", "vs full")]  # so that it fits 80 columns
    for i in columns:
        table.add_column(head[i], justify="left" if head[i] in ("model", "budget", "method") else "right", no_wrap=True)
    for line in lines:
        table.add_row(*(line[i] for i in columns))
    out.print(table)
    for versus in result.versus:
        if versus.budget != "100%":
            remark = "" if versus.apart else " (not significant)"
            out.print(f"{versus.first} − {versus.second} at {versus.budget}: {versus.difference}{remark}", markup=False)


def show_tasks(rows: Sequence[dict[str, str]]) -> None:
    """The table of tasks."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("name", "summary", "source"):
        table.add_column("task" if name == "name" else name, no_wrap=name == "name")
    for row in rows:
        table.add_row(*row.values())
    out.print(table)
