"""Worker processes of this machine. Each does one run at a time; a run whose process dies is repeated."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from joblib import cpu_count

from einlinear_lab.pools.pool import Event, Job
from einlinear_lab.runs.execution import execute
from einlinear_lab.runs.run import Run
from einlinear_lab.training.loop import Progress

# Of a run whose process dies.
ATTEMPTS = 3
# File in the folder of a run that ends it.
_STOP = "stop"
# Seconds to wait for a process that an earlier driver left behind, and between two progress messages of a run.
_PATIENCE, _INTERVAL = 30, 0.2
_VISIBLE = "CUDA_VISIBLE_DEVICES"
# A fork of a process with threads, such as torch's, may hang. A fork server that imported torch saves every new process
# the seconds of the import.
if sys.platform == "win32":
    _processes = multiprocessing.get_context("spawn")
else:
    _processes = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class LocalPool:
    """A `Pool` of local processes, each with some CPU threads and, round-robin, one of the GPUs.

    The functions of `setup` register families in every process; they can be pickled.
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
                    job, event = worker.job, worker.event()
                    assert job is not None
                    if event is not None:
                        yield event
                        continue
                    workers[workers.index(worker)] = _Worker(self, worker.device)
                    run = job[0]
                    deaths[run.key] += 1
                    if deaths[run.key] < ATTEMPTS:
                        again.append(job)
                        message = "its process died; it is done again, from a checkpoint if it has one"
                        yield Event(run, "lost", message=message)
                    else:
                        message = f"its process died {ATTEMPTS} times: it was killed, or the memory was not enough"
                        yield Event(run, "failed", message=message)
        finally:
            for worker in workers:
                worker.process.terminate()
            for worker in workers:
                worker.process.join()


def default_workers(runs: Sequence[Run]) -> int:
    """Return the number of processes for these runs: one per CPU core, or per GPU if they train on GPUs."""
    on_gpus = any(run.training.device == "cuda" for run in runs)
    return max(1, min(len(_devices()) if on_gpus else cpu_count(), len(runs)))


def _devices() -> list[str]:
    """Return the ids of the GPUs that this process sees."""
    count = torch.cuda.device_count()
    visible = os.environ.get(_VISIBLE)
    return visible.split(",")[:count] if visible else [str(index) for index in range(count)]


class _Worker:
    def __init__(self, pool: LocalPool, device: str | None) -> None:
        self.connection, theirs = _processes.Pipe()
        self.device = device
        self.job: Job | None = None
        arguments = theirs, os.getcwd(), pool.threads, pool.setup, device
        self.process = _processes.Process(target=_work, args=arguments, daemon=True)
        with neutral_directory():
            self.process.start()
        # The connection then ends with the process.
        theirs.close()

    def start(self, job: Job) -> None:
        self.job = job
        run, folder = job
        # If the process is dead, `event` returns None.
        with suppress(OSError):
            self.connection.send((run.config, folder))

    def event(self) -> Event | None:
        """Return the next event of the run, or None if the process died."""
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
    connection: Connection, current: str, threads: int, setup: Sequence[Callable[[], None]], device: str | None
) -> None:
    """Do the runs that the driver sends, in its working folder, until the driver ends."""
    # Ctrl-C reaches the driver, which stops all processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.chdir(current)
    if device is not None:
        # CUDA reads it at its first use.
        os.environ[_VISIBLE] = device
    torch.set_num_threads(threads)
    for prepare in setup:
        prepare()
    last = 0.0

    def progress(step: int, steps: int, loss: float) -> None:
        nonlocal last
        if time.monotonic() > last + _INTERVAL:
            last = time.monotonic()
            connection.send({"status": "running", "step": step, "steps": steps, "loss": loss})

    # Raised when the driver ends.
    with suppress(EOFError, BrokenPipeError):
        while True:
            options, folder = connection.recv()
            last = 0.0
            connection.send(attempt(options, folder, progress))


@contextmanager
def neutral_directory() -> Iterator[None]:
    """Start processes from Python's own folder, so that they do not import from the current one.

    Python and Ray import from the folder where a process starts: a file types.py there would be executed.
    """
    current = os.getcwd()
    os.chdir(sys.prefix)
    try:
        yield
    finally:
        os.chdir(current)


class _Stopped(Exception):
    """`stop` was called for the run."""


def stop(folder: Path) -> None:
    """Stop the run in a folder, on whichever machine it is."""
    (folder / _STOP).touch()


def attempt(options: Mapping[str, Any], folder: Path, progress: Progress | None = None) -> dict[str, str]:
    """Do a run from its options in this process; return the status and the message of its last event.

    Errors become a message; bugs, a traceback. Raises BrokenPipeError when progress cannot be reported to the driver.
    """
    began = time.monotonic()

    def watched(step: int, steps: int, loss: float) -> None:
        if (folder / _STOP).exists():
            raise _Stopped
        if progress is not None:
            progress(step, steps, loss)

    while True:
        try:
            execute(Run.of(options), folder, watched)
            return {"status": "finished"}
        except _Stopped:
            # The next attempt does the whole run.
            (folder / _STOP).unlink(missing_ok=True)
            return {"status": "stopped"}
        except BlockingIOError as error:
            if time.monotonic() > began + _PATIENCE:
                return {"status": "failed", "message": str(error)}
            time.sleep(1)
        except BrokenPipeError:
            raise
        except Exception as error:
            message = str(error) if isinstance(error, (ValueError, OSError)) else traceback.format_exc()
            return {"status": "failed", "message": message}
