"""Runs on a Ray cluster, whose machines see the same results folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from einlinear_lab.pools.local import ATTEMPTS, attempt, neutral_directory
from einlinear_lab.pools.pool import Event, Job
from einlinear_lab.runs.run import Run

# A process may do several runs.
_set_up = False


@dataclass(frozen=True)
class RayPool:
    """A `Pool` on a Ray cluster (default: $RAY_ADDRESS, or a new one) with resources per run, each with one event."""

    address: str | None = None
    cpus: float = 1
    gpus: float = 0
    setup: Sequence[Callable[[], None]] = ()

    def __call__(self, jobs: Iterable[Job]) -> Iterator[Event]:
        import ray

        started = not ray.is_initialized()
        if started:
            with neutral_directory():
                ray.init(address=self.address, logging_level=logging.WARNING, log_to_driver=False)
        try:
            remote = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=ATTEMPTS - 1)(_attempt)
            current, setup = os.getcwd(), tuple(self.setup)
            left, waiting = iter(jobs), dict[Any, Run]()
            while True:
                # A fixed list is queued at once, so that the cluster can scale up.
                room = len(jobs) if isinstance(jobs, Sequence) else self._room(ray.cluster_resources())  # type: ignore[no-untyped-call]
                for run, folder in islice(left, max(0, room - len(waiting))):
                    waiting[remote.remote(run.config, str(folder), current, setup)] = run
                if not waiting:
                    return
                (reference,), _ = ray.wait(list(waiting), num_returns=1)
                run = waiting.pop(reference)
                try:
                    yield Event(run, **ray.get(reference))
                # Raised before the run began.
                except ray.exceptions.RayTaskError as error:
                    yield Event(run, "failed", message=str(error))
                except ray.exceptions.RayError as error:
                    yield Event(run, "failed", message=f"its process died {ATTEMPTS} times: {error}")
        finally:
            if started:
                ray.shutdown()

    def _room(self, resources: Mapping[str, float]) -> int:
        needed = {"CPU": self.cpus, "GPU": self.gpus}
        return max(1, min((int(resources.get(name, 0) // count) for name, count in needed.items() if count), default=1))


def _attempt(options: dict[str, Any], folder: str, current: str, setup: Sequence[Callable[[], None]]) -> dict[str, str]:
    """Do a run in the driver's working folder, after the setup of this process."""
    global _set_up
    os.chdir(current)
    if not _set_up:
        for prepare in setup:
            prepare()
        _set_up = True
    return attempt(options, Path(folder))
