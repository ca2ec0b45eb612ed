"""Execution of the missing runs of a sweep on a pool of workers, with a table of all runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from einlinear_lab.runs.run import Run
from einlinear_lab.runs.store import Store
from einlinear_lab.runs.table import RunTable

# A run and its folder.
Job = tuple[Run, Path]


@dataclass(frozen=True)
class Event:
    """Change of a run's status.

    Attributes:
        status: "running", "finished", "stopped" (by `workers.stop`), "lost" (its worker died, and it is repeated) or
            "failed".
        step, steps, loss: progress of a running run.
        message: error of a failed or lost run.
    """

    run: Run
    status: str
    step: int = 0
    steps: int = 0
    loss: float = float("nan")
    message: str = ""


class Pool(Protocol):
    """Pool of workers: processes of this machine, or a cluster."""

    def __call__(self, jobs: Iterable[Job]) -> Iterator[Event]:
        """Do runs, each in its folder; the last event of a run is "finished", "stopped" or "failed".

        The next job is requested when a worker is free and all events so far have been consumed.
        """


def do(
    runs: Sequence[Run], store: Store, pool: Pool, watch: Callable[[Event], None] = lambda event: None
) -> list[Event]:
    """Do the unfinished runs, update the table of all runs, and return the events of failed runs.

    Args:
        store: opened for these runs.
        watch: called with every event.

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
