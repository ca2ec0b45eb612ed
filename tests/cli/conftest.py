"""Training in this process, where it can be watched."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from einlinear.experiments.runs.execute import execute
from einlinear.experiments.runs.run import Run
from einlinear.experiments.sweeps import workers
from einlinear.experiments.sweeps.sweep import Event


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that were trained, in order, in this process."""
    runs: list[Run] = []

    def here(tasks: Sequence[tuple[Run, Path]]) -> Iterator[Event]:
        for run, folder in tasks:
            runs.append(run)
            yield Event(run, "running", 1, 5, 2.0)
            execute(run, folder)
            yield Event(run, "finished")

    monkeypatch.setattr(workers, "Workers", lambda *_: here)
    return runs
