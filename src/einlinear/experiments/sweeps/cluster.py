"""Runs on a Ray cluster, whose machines see the same results folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from einlinear.experiments.runs.execute import execute
from einlinear.experiments.runs.run import Run
from einlinear.experiments.sweeps.sweep import Event

ATTEMPTS = 3  # of a run whose process dies every time


@dataclass(frozen=True)
class Cluster:
    """A `Pool` that hands runs to Ray.

    Attributes:
        address: of the cluster; None: that of $RAY_ADDRESS, or a new one on this machine.
        cpus, gpus: that a run takes.
        setup: called before every run, to register families; can be pickled.
    """

    address: str | None = None
    cpus: float = 1
    gpus: float = 0
    setup: Sequence[Callable[[], None]] = ()

    def __call__(self, tasks: Sequence[tuple[Run, Path]]) -> Iterator[Event]:
        import ray

        started = not ray.is_initialized()
        if started:
            ray.init(address=self.address, logging_level=logging.WARNING, log_to_driver=False)
        try:
            remote = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=ATTEMPTS - 1)(_done)
            waiting = {
                remote.remote(run.options, str(folder.resolve()), tuple(self.setup)): run for run, folder in tasks
            }
            for run, _ in tasks:
                yield Event(run, "running", steps=run.training.steps)
            while waiting:
                (reference,), _ = ray.wait(list(waiting), num_returns=1)
                run = waiting.pop(reference)
                try:
                    yield Event(run, **ray.get(reference))
                except ray.exceptions.RayError as error:
                    yield Event(run, "failed", message=f"its process died {ATTEMPTS} times: {error}")
        finally:
            if started:
                ray.shutdown()


def _done(options: dict[str, Any], folder: str, setup: Sequence[Callable[[], None]]) -> dict[str, Any]:
    for prepare in setup:
        prepare()
    try:
        execute(Run.of(options), Path(folder))
    except (ValueError, OSError) as error:
        return {"status": "failed", "message": str(error)}
    return {"status": "finished"}
