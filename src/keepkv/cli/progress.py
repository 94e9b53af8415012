"""Progress on standard error. Imports nothing heavy: it is on the screen while the rest is being imported."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

PIPED_WIDTH = 140  # columns of what goes into a file or a pipe, where no terminal says how many there are

out = Console(highlight=False)
if not out.is_terminal and "COLUMNS" not in os.environ:
    out.width = PIPED_WIDTH
err = Console(stderr=True, highlight=False)


class Bar:
    """One line of progress, whose title and length change from phase to phase. It is shown only in a terminal."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def phase(self, title: str) -> Bar:
        """Starts a phase of unknown length."""
        self._progress.reset(self._task, description=title, total=None)
        return self

    def counted(self, before: str) -> Callable[[str], Bar]:
        """Phases whose titles begin with that."""
        return lambda title: self.phase(before + title)

    def title(self, title: str) -> None:
        """Says something else about the same phase."""
        self._progress.update(self._task, description=title)

    def hide(self) -> None:
        """Removes the line, so that other output has room."""
        self._progress.stop()

    def __call__(self, completed: int, total: int) -> None:
        self._progress.update(self._task, completed=completed, total=total)


@contextmanager
def bar(title: str) -> Iterator[Bar]:
    """A progress line on standard error that goes away at the end."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        yield Bar(progress, progress.add_task(title, total=None))
