"""Runs on processes of this machine: each process does one at a time, and a run whose process dies is done again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from joblib import cpu_count

from einlinear_lab.runs.run import Run
from einlinear_lab.sweeps.attempts import ATTEMPTS, attempt
from einlinear_lab.sweeps.driver import Event, Job
from einlinear_lab.sweeps.starting import away
from einlinear_lab.training.loop import Progress

_EVERY = 0.2  # seconds between two messages of a run
_VISIBLE = "CUDA_VISIBLE_DEVICES"

# Not "fork": a fork of a process with threads, such as torch's, may hang. A server that has done no more than import
# torch can be forked, and saves every new process the seconds that this takes.
if sys.platform == "win32":
    _processes = multiprocessing.get_context("spawn")
else:
    _processes = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Workers:
    """A `Pool` of processes. Where there are GPUs, each process sees one, the first one again after the last.

    Attributes:
        count: how many.
        threads: of each; a run's own setting overrides it.
        setup: called in every process before its first run, to register families; can be pickled.
    """

    count: int
    threads: int = 1
    setup: Sequence[Callable[[], None]] = ()

    def __call__(self, jobs: Iterable[Job]) -> Iterator[Event]:
        waiting, again, deaths = iter(jobs), deque[Job](), Counter[str]()
        _processes.set_forkserver_preload(["einlinear_lab.runs.execution"])
        devices = cycle(_devices() or [None])
        workers: list[_Worker] = []
        try:
            while True:
                idle = [worker for worker in workers if not worker.job]
                while idle or len(workers) < self.count:
                    job = again.popleft() if again else next(waiting, None)
                    if job is None:
                        break
                    if not idle:
                        workers.append(_Worker(self, next(devices)))
                        idle = workers[-1:]
                    idle.pop().start(job)
                busy: dict[Any, _Worker] = {worker.connection: worker for worker in workers if worker.job}
                if not busy:
                    return
                for connection in wait(list(busy)):
                    worker = busy[connection]
                    assert worker.job is not None
                    run, folder = worker.job
                    event = worker.event()
                    if event is None:  # it died
                        workers[workers.index(worker)] = _Worker(self, worker.device)
                        deaths[run.key] += 1
                        if deaths[run.key] < ATTEMPTS:
                            again.append((run, folder))
                            yield Event(
                                run,
                                "lost",
                                message="its process died; it is done again, from a checkpoint if it has one",
                            )
                        else:
                            message = f"its process died {ATTEMPTS} times: it was killed, or the memory was not enough"
                            yield Event(run, "failed", message=message)
                    else:
                        yield event
        finally:
            for worker in workers:
                worker.process.terminate()
            for worker in workers:
                worker.process.join()


def suited(runs: Sequence[Run]) -> int:
    """How many processes suit these runs: one for each core, or for each GPU if they are on GPUs."""
    on_gpus = any(run.training.device == "cuda" for run in runs)
    return max(1, min(len(_devices()) if on_gpus else cpu_count(), len(runs)))


def _devices() -> list[str]:
    """The GPUs that this process sees, as CUDA knows them."""
    count = torch.cuda.device_count()
    visible = os.environ.get(_VISIBLE)
    return visible.split(",")[:count] if visible else [str(index) for index in range(count)]


class _Worker:
    """A process, as its driver sees it."""

    def __init__(self, pool: Workers, device: str | None) -> None:
        self.connection, theirs = _processes.Pipe()
        self.device = device
        self.job: Job | None = None
        arguments = theirs, os.getcwd(), pool.threads, pool.setup, device
        self.process: BaseProcess = _processes.Process(target=_work, args=arguments, daemon=True)
        with away():
            self.process.start()
        theirs.close()  # so that its death ends the connection

    def start(self, job: Job) -> None:
        self.job = job
        run, folder = job
        with suppress(OSError):  # it is dead, as `event` will say
            self.connection.send((run.options, folder))

    def event(self) -> Event | None:
        """The next event of the run, or None if the process died."""
        assert self.job is not None
        try:
            event = Event(self.job[0], **self.connection.recv())
        except (EOFError, OSError):
            self.process.join()
            return None
        if event.status != "running":
            self.job = None
        return event


def _work(
    connection: Connection, where: str, threads: int, setup: Sequence[Callable[[], None]], device: str | None
) -> None:
    """The life of a process: it does what it is sent, and ends with its driver, whose paths may be relative."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's, which stops all
    os.chdir(where)
    if device is not None:
        os.environ[_VISIBLE] = device  # CUDA reads it when it is first used
    torch.set_num_threads(threads)
    for prepare in setup:
        prepare()
    with suppress(EOFError, BrokenPipeError):  # the driver is gone
        while True:
            options, folder = connection.recv()
            connection.send(attempt(options, folder, _reports(connection)))


def _reports(connection: Connection) -> Progress:
    """Tells the driver how far a run is, now and then."""
    said = 0.0

    def progress(step: int, steps: int, loss: float) -> None:
        nonlocal said
        if time.monotonic() > said + _EVERY:
            said = time.monotonic()
            connection.send({"status": "running", "step": step, "steps": steps, "loss": loss})

    return progress
