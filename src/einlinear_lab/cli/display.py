"""Output of commands: messages, tables, progress bars, and the end of a command by an error or Ctrl-C."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import typer
from rich import table as rich_table
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
from rich.text import Text

if TYPE_CHECKING:
    from einlinear_lab.analysis.columns import Column

# Seconds between two lines of progress without a terminal.
_INTERVAL = 10


def note(message: str) -> None:
    """Print a message; markup characters stay as they are."""
    Console().print(Text(message), soft_wrap=True)


def error(message: str) -> None:
    """Print an error in red to stderr."""
    Console(stderr=True).print(Text(f"error: {message}", style="red"), soft_wrap=True)


def warning(message: str) -> None:
    """Print a warning in yellow to stderr."""
    Console(stderr=True).print(Text(message, style="yellow"), soft_wrap=True)


def show(headings: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None, prose: bool = False) -> None:
    """Print a table of texts; columns after the first are right-aligned and not wrapped, unless they hold prose."""
    table = rich_table.Table(
        title=Text(title) if title else None, title_justify="left", box=None, pad_edge=False, header_style="bold"
    )
    for i, heading in enumerate(headings):
        number = i > 0 and not prose
        table.add_column(heading, justify="right" if number else "left", overflow="fold", no_wrap=number)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    # A pipe or file has no width.
    (console if console.is_terminal else Console(width=250)).print(table)


def show_columns(columns: Sequence[Column]) -> None:
    """Print a table of numbers."""
    show([column.heading for column in columns], zip(*(column.texts for column in columns), strict=True))


def progress(*more: ProgressColumn) -> Progress:
    """Return progress bars with these further columns; shown only in a terminal, by the first process of torchrun."""
    console, narrow = Console(), rich_table.Column(no_wrap=True, overflow="ellipsis", max_width=44)
    description = TextColumn("{task.description}", markup=False, table_column=narrow)
    columns = (description, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), *more)
    shown = console.is_terminal and os.environ.get("RANK", "0") == "0"
    return Progress(*columns, console=console, transient=True, disable=not shown)


@contextmanager
def steps() -> Iterator[Callable[[str, int, int | None], None]]:
    """Yield a function that shows the progress of tasks in sequence, called with (task, done, total)."""
    started, last, tasks = time.monotonic(), 0.0, set[str]()

    def print_line(task: str, done: int, total: int | None) -> None:
        nonlocal last
        now = time.monotonic()
        if os.environ.get("RANK", "0") != "0" or (task in tasks and now - last < _INTERVAL):
            return
        tasks.add(task)
        last = now
        note(f"{task}: {done:,}{'' if total is None else f' of {total:,}'} ({now - started:.0f} s)")

    with progress() as bars:
        yield print_line if bars.disable else partial(advance, bars)


def advance(bars: Progress, name: str, done: int, total: int | None) -> None:
    """Show the progress of a task as the only bar."""
    # A path may be long.
    name = name if len(name) <= 40 else f"…{name[-39:]}"
    for task in bars.tasks:
        if task.description != name:
            bars.remove_task(task.id)
    if not bars.tasks:
        bars.add_task(name, total=total)
    bars.update(bars.tasks[0].id, completed=done)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors of wrong arguments, files and missing packages into a message and exit code 2.

    For checks of the user's input only: later, an error of the same type is a bug.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as problem:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            error(str(problem))
        raise typer.Exit(2) from None


@contextmanager
def system_errors() -> Iterator[None]:
    """Turn errors of the system during training, such as a full disk, into a message and exit code 2."""
    try:
        yield
    except OSError as problem:
        error(str(problem))
        raise typer.Exit(2) from None


@contextmanager
def interruptible(message: str) -> Iterator[None]:
    """End the command on Ctrl-C with a message and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        warning(message)
        raise typer.Exit(130) from None


def fail(messages: Sequence[str]) -> None:
    """Print messages as errors and exit with code 1, if there are any."""
    for message in messages:
        error(message)
    if messages:
        raise typer.Exit(1)
