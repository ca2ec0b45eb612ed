"""Runs of a command: do the missing ones with progress bars, then report."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import Progress, TaskID, TextColumn

from einlinear_lab.cli import display
from einlinear_lab.cli.importing import setup
from einlinear_lab.cli.packages import RAY, require
from einlinear_lab.cli.results import report_command

if TYPE_CHECKING:
    from einlinear_lab.pools.pool import Event, Pool
    from einlinear_lab.runs.run import Run
    from einlinear_lab.sweeps.sweep import Sweep

# Of the skipped files.
_SHOWN = 20
# Beside every bar.
_LOSS = "{task.fields[loss]}"


def command_line() -> str:
    """Return the command line without passwords."""
    from einlinear_lab.runs.passwords import without_passwords

    return shlex.join(["einlinear", *map(without_passwords, sys.argv[1:])])


def refuse(options: Mapping[str, object], why: str) -> None:
    """Raise ValueError if one of these options is set."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} {why}")


def ray_pool(on: str, workers: int | None, address: str | None, cpus: float | None, gpus: float | None) -> Pool | None:
    """Return the pool of --on ray, None for --on local. Raises ValueError for options that have no effect with it."""
    if on == "local":
        refuse({"--address": address, "--cpus": cpus, "--gpus": gpus}, "goes with --on ray")
        return None
    if on != "ray":
        raise ValueError(f"--on must be local or ray, not {on!r}")
    refuse({"--workers": workers}, "goes with --on local: on Ray --cpus and --gpus say how many runs fit")
    require(RAY)
    from einlinear_lab.pools.ray import RayPool

    return RayPool(address, 1 if cpus is None else cpus, gpus or 0, setup())


def check_here(runs: Iterable[Run]) -> None:
    """Raise ValueError or ModuleNotFoundError if this machine lacks a device or a package, or cannot share a batch."""
    from einlinear_lab.training.distributed import check_batch, check_device, processes
    from einlinear_lab.training.metrics import check_installed

    for run in runs:
        check_device(run.training.device)
        check_batch(run.data.batch_size, processes(), run.training.accumulate)
        if run.training.tracker:
            check_installed(run.training.tracker)


def check_many(runs: Sequence[Run], pool: Pool | None) -> None:
    """Check before training that the pool, or this machine, can do the runs; raises as `check_here`."""
    if "RANK" in os.environ:
        raise ValueError("torchrun shares one run among its processes (einlinear train); start this without it")
    if pool is None:
        check_here(runs)
    say_skipped(runs)


def say_skipped(runs: Iterable[Run]) -> None:
    """Warn about skipped files of the user's data."""
    for data in dict.fromkeys(run.data for run in runs):
        if skipped := data.skipped():
            more = f" and {len(skipped) - _SHOWN} more" if skipped[_SHOWN:] else ""
            files = "1 file" if len(skipped) == 1 else f"{len(skipped)} files"
            names = ", ".join(skipped[:_SHOWN])
            display.warning(f"Left out {files} of {data.data} that cannot be read: {names}{more}.")


def run_sweep(
    sweep: Sweep, folder: Path, workers: int | None, mix_code: bool, pool: Pool | None = None, interleave: bool = False
) -> None:
    """Train the missing runs of a sweep, on processes of this machine, in turns or on another pool, and report."""
    from einlinear_lab.pools.interleaved import InterleavedPool
    from einlinear_lab.pools.pool import run_missing
    from einlinear_lab.runs.execution import check_runs
    from einlinear_lab.runs.store import Store

    store = Store(folder)
    with display.user_errors():
        if interleave:
            refuse({"--workers": workers}, "has no meaning with --interleave: the runs take turns in one process")
        check_many(sweep.runs, pool)
        store.open(sweep.runs, sweep.axes, command_line(), mix_code, check_runs(sweep.runs))
        for problem in store.damaged():
            display.warning(f"{problem}; if it belongs here it is done again")
        missing = store.missing(sweep.runs)
    finished = len(sweep.runs) - len(missing)
    already = f"; {finished} of {len(sweep.runs)} are already there" if finished else ""
    display.note(f"{len(missing)} runs to do, results in {folder}{already}.")
    pool = InterleavedPool() if interleave else pool
    failed = watched(partial(run_missing, sweep.runs, store), missing, folder, workers, pool) if missing else []
    report_command([folder])
    display.fail(failed)


def watched(
    do: Callable[[Pool, Callable[[Event], None]], list[Event]],
    runs: Sequence[Run],
    folder: Path,
    workers: int | None,
    pool: Pool | None,
    done: int = 0,
) -> list[str]:
    """Do runs with progress bars, by default on processes of this machine; return the errors of those that failed."""
    from joblib import cpu_count

    from einlinear_lab.pools.local import LocalPool, default_workers

    count = workers or default_workers(runs)
    pool = pool or LocalPool(count, max(1, cpu_count() // count), setup())
    interrupted = f"Interrupted. {folder} keeps what was done; the same command goes on from there."
    with display.interruptible(interrupted), display.progress(TextColumn(_LOSS)) as bars, display.system_errors():
        failed = do(pool, _Watch(bars, len(runs), done).see)
    return [f"{event.run.name} failed: {event.message}" for event in failed]


class _Watch:
    def __init__(self, progress: Progress, total: int, done: int) -> None:
        self._progress = progress
        self._all = progress.add_task("runs", total=total, completed=done, loss="")
        self._bars: dict[str, TaskID] = {}

    def see(self, event: Event) -> None:
        key = event.run.key
        if event.status == "running":
            if key not in self._bars:
                self._bars[key] = self._progress.add_task(_title(event.run), loss="")
            loss = f"loss {event.loss:.3f}" if event.step else ""
            self._progress.update(self._bars[key], completed=event.step, total=event.steps or None, loss=loss)
            return
        if key in self._bars:
            self._progress.remove_task(self._bars.pop(key))
        if event.status == "lost":
            display.warning(f"{_title(event.run)}: {event.message}")
        else:
            self._progress.advance(self._all)


@contextmanager
def bar(run: Run) -> Iterator[Callable[[int, int, float], None]]:
    """Show the progress bar of a single run; yield the function that updates it."""
    with display.progress(TextColumn(_LOSS)) as progress:
        task = progress.add_task(_title(run), loss="")
        yield lambda step, steps, loss: progress.update(task, completed=step, total=steps, loss=f"loss {loss:.3f}")


def _title(run: Run) -> str:
    return f"{run.model.structure}, width {run.model.width}, lr {run.training.lr:g}, seed {run.seed}"
