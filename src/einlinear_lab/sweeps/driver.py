"""Doing those runs of a sweep that are missing, wherever they are done, and keeping the table of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from einlinear_lab.runs.run import Run
from einlinear_lab.runs.store import Store
from einlinear_lab.runs.table import RunTable

Job = tuple[Run, Path]  # a run, and the folder that it is kept in


@dataclass(frozen=True)
class Event:
    """What became of a run.

    Attributes:
        run: which.
        status: "running", "finished", "stopped" (as `attempts.stop` asked for), "lost" (its worker died: it is tried
            again) or "failed".
        step, steps, loss: how far it is, where it is running.
        message: what went wrong, where it failed.
    """

    run: Run
    status: str
    step: int = 0
    steps: int = 0
    loss: float = float("nan")
    message: str = ""


class Pool(Protocol):
    """Where runs are done: processes of this machine, or a cluster."""

    def __call__(self, jobs: Iterable[Job]) -> Iterator[Event]:
        """Do runs, each in its folder; every run ends with one event that is "finished", "stopped" or "failed".

        The next job is asked for when there is room for it, and all events so far have been seen.
        """


def do(
    runs: Sequence[Run],
    store: Store,
    pool: Pool,
    watch: Callable[[Event], None] = lambda event: None,
) -> list[Event]:
    """Do the runs that are not finished, keep the table of all up to date, and say which failed.

    Args:
        runs: to be done.
        store: opened for them.
        pool: where.
        watch: called with everything that happens.

    Raises:
        BlockingIOError: another driver is at work in the folder.
    """
    failed = []
    with store.driving(), RunTable(store.folder) as table:
        missing = store.missing(runs)
        table.rebuild(store.records(), missing)
        for event in pool([(run, store.path(run)) for run in missing]):
            table.note(event.run, store.path(event.run), event.status, event.message)
            if event.status == "failed":
                failed.append(event)
            watch(event)
    return failed
