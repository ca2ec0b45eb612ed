"""Runs that take turns in this process, so that their training times can be compared.

The speed of a machine drifts: it warms up, and others use it. Every turn is 1/50 of a run, so all runs of a seed make
the same progress at the same time, and a drift slows all of them alike.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from einlinear_lab.pools.pool import Event, Job
from einlinear_lab.runs.execution import execute_in_steps
from einlinear_lab.runs.run import Run

# Turns of every run.
TURNS = 50
# Checkpoints of every run without `checkpoint_every`: an interruption stops all runs of a seed.
CHECKPOINTS = 10


@dataclass(frozen=True)
class InterleavedPool:
    """A `Pool` of this process alone, which holds the models of all runs of a seed at once."""

    def __call__(self, jobs: Iterable[Job]) -> Iterator[Event]:
        by_seed: dict[int, list[Job]] = {}
        for job in jobs:
            by_seed.setdefault(job[0].seed, []).append(job)
        threads = torch.get_num_threads()
        try:
            for group in by_seed.values():
                yield from _take_turns(group)
        finally:
            torch.set_num_threads(threads)


def _take_turns(jobs: Sequence[Job]) -> Iterator[Event]:
    with ExitStack() as stack:
        paused = [_PausedRun(run, folder) for run, folder in jobs]
        for run in paused:
            stack.callback(run.close)
        while paused:
            for run in list(paused):
                event = run.resume()
                if event.status != "running":
                    paused.remove(run)
                yield event


class _PausedRun:
    """A run that is continued turn by turn, with the same random numbers as alone."""

    def __init__(self, run: Run, folder: Path) -> None:
        steps = run.training.steps
        self._run, self._length = run, max(1, steps // TURNS)
        saving = run.training.checkpoint_every or max(1, steps // CHECKPOINTS)
        self._steps = execute_in_steps(replace(run, training=replace(run.training, checkpoint_every=saving)), folder)
        self._random, self._threads = torch.get_rng_state(), torch.get_num_threads()

    def resume(self) -> Event:
        """Make the steps of one turn."""
        others = torch.get_rng_state()
        torch.set_rng_state(self._random)
        torch.set_num_threads(self._threads)
        try:
            reports = list(islice(self._steps, self._length))
        except Exception as error:
            message = str(error) if isinstance(error, (ValueError, OSError)) else traceback.format_exc()
            return Event(self._run, "failed", message=message)
        finally:
            self._random = torch.get_rng_state()
            torch.set_rng_state(others)
        is_finished = len(reports) < self._length
        return Event(self._run, "finished") if is_finished else Event(self._run, "running", *reports[-1])

    def close(self) -> None:
        """Free the folder and the memory of an unfinished run."""
        self._steps.close()
