"""Training in this process, where it can be watched."""

from collections.abc import Iterator, Sequence

import pytest

from einlinear_lab.pools import local
from einlinear_lab.pools.pool import Event, Job
from einlinear_lab.runs.execution import execute
from einlinear_lab.runs.run import Run


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that were trained, in order, in this process."""
    runs: list[Run] = []

    def here(jobs: Sequence[Job]) -> Iterator[Event]:
        for run, folder in jobs:
            runs.append(run)
            yield Event(run, "running", 1, 5, 2.0)
            execute(run, folder)
            yield Event(run, "finished")

    monkeypatch.setattr(local, "LocalPool", lambda *_: here)
    return runs
