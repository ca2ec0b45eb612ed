"""What several commands print: messages, tables, progress bars."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

_SECONDS = 10  # between two lines of progress, where there is no terminal


def note(message: str) -> None:
    """A line to the terminal, its markup characters as they are."""
    Console().print(Text(message), soft_wrap=True)


def error(message: str) -> None:
    """A message in red to stderr."""
    Console(stderr=True).print(Text(f"error: {message}", style="red"), soft_wrap=True)


def warning(message: str) -> None:
    """A message in yellow to stderr."""
    Console(stderr=True).print(Text(message, style="yellow"), soft_wrap=True)


def show(headings: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None, prose: bool = False) -> None:
    """A table of texts: the first column to the left; the others to the right and unbroken, unless some hold prose."""
    table = Table(
        title=Text(title) if title else None, title_justify="left", box=None, pad_edge=False, header_style="bold"
    )
    for i, heading in enumerate(headings):
        number = i > 0 and not prose
        table.add_column(heading, justify="right" if number else "left", overflow="fold", no_wrap=number)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    (console if console.is_terminal else Console(width=250)).print(table)  # a pipe or file has no width to fit it into


def progress(*more: ProgressColumn) -> Progress:
    """Progress bars with these further columns. Only a terminal shows them, and of torchrun's processes the first."""
    console = Console()
    columns = (
        TextColumn(
            "{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", max_width=44)
        ),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        *more,
    )
    shown = console.is_terminal and os.environ.get("RANK", "0") == "0"
    return Progress(*columns, console=console, transient=True, disable=not shown)


@contextmanager
def steps() -> Iterator[Callable[[str, int, int | None], None]]:
    """Show how far one thing after the other has come: in a terminal by a bar, elsewhere by a line now and then."""
    with progress() as bars:
        lines = _Lines(is_shown=os.environ.get("RANK", "0") == "0")
        yield lines if bars.disable else partial(advance, bars)


class _Lines:
    """A line when a thing is begun for the first time, and one every ten seconds."""

    def __init__(self, is_shown: bool) -> None:
        self._is_shown = is_shown
        self._start = time.monotonic()
        self._last = -math.inf
        self._begun = set[str]()

    def __call__(self, what: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if not self._is_shown or (what in self._begun and now - self._last < _SECONDS):
            return
        self._begun.add(what)
        self._last = now
        note(f"{what}: {done:,}{'' if total is None else f' of {total:,}'} ({now - self._start:.0f} s)")


def advance(bars: Progress, what: str, done: int, total: int | None) -> None:
    """Show how far one thing has come, the only one at a time."""
    what = what if len(what) <= 40 else f"…{what[-39:]}"  # a path may be long
    for task in bars.tasks:
        if task.description != what:
            bars.remove_task(task.id)
    if not bars.tasks:
        bars.add_task(what, total=total)
    bars.update(bars.tasks[0].id, completed=done)
