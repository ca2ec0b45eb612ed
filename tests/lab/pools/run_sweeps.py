"""A small sweep, and its execution in this process or on a pool."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from einlinear_lab.pools.pool import Event, Job, Pool, run_missing
from einlinear_lab.runs.execution import execute
from einlinear_lab.runs.store import Store
from einlinear_lab.sweeps.sweep import Sweep

SETTINGS: dict[str, Any] = {"data": "digits", "width": 16, "depth": 1, "batch_size": 128, "steps": 6}
FOUR: dict[str, Any] = {"config": SETTINGS, "grid": {"structure": ["dense", "btt"], "seed": [0, 1]}}


def here(jobs: Sequence[Job]) -> Iterator[Event]:
    """A pool of this process alone."""
    for run, folder in jobs:
        execute(run, folder)
        yield Event(run, "finished")


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """What matters of every run, by its key: not how long it took."""
    found = {}
    for record in Store(folder).records():
        assert record.result is not None
        found[record.run.key] = {
            "train_loss": record.result.train_loss,
            "steps": record.result.steps,
            **record.result.metrics,
        }
    return found


def run_sweep(sweep: Sweep, folder: Path, pool: Pool = here, **options: Any) -> list[Event]:
    seen: list[Event] = []
    store = Store(folder)
    store.open(sweep.runs, sweep.axes, **options)
    run_missing(sweep.runs, store, pool, seen.append)
    return seen
