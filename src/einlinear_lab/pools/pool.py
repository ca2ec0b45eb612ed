"""Execution of the missing runs of a sweep on a pool of workers, with a table of all runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from einlinear_lab.runs.run import Run
from einlinear_lab.runs.store import Store
from einlinear_lab.runs.table import RunTable

# A run and its folder.
Job = tuple[Run, Path]


@dataclass(frozen=True)
class Event:
    """Change of a run's status, with the progress of a running run or the error of a failed or lost one.

    The status is "running", "finished", "stopped" (by `local.stop`), "lost" (its worker died, and it is repeated) or
    "failed".
    """

    run: Run
    status: str
    step: int = 0
    steps: int = 0
    loss: float = float("nan")
    message: str = ""


# Does runs on processes of this machine or on a cluster; the last event of a run is "finished", "stopped" or "failed".
# The next job is requested when a worker is free and all events so far have been consumed.
Pool = Callable[[Iterable[Job]], Iterator[Event]]


def run_missing(
    runs: Sequence[Run], store: Store, pool: Pool, watch: Callable[[Event], None] = lambda event: None
) -> list[Event]:
    """Do the unfinished runs of an opened store, update the table of all runs, and return the events of failed runs.

    Raises BlockingIOError if another driver is at work in the folder.
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
