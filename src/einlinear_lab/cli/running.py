"""Doing the runs of a command: what is missing, with progress bars, then the report."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.progress import Progress, TaskID, TextColumn

from einlinear_lab.cli import display, report
from einlinear_lab.cli.endings import interruptible, system_errors, user_errors
from einlinear_lab.cli.importing import setup
from einlinear_lab.cli.packages import RAY, require

if TYPE_CHECKING:  # heavy: imported where it is needed
    from einlinear_lab.runs.run import Run
    from einlinear_lab.sweeps.driver import Event, Pool
    from einlinear_lab.sweeps.sweep import Sweep

_SHOWN = 20  # of the files that are left out


def loss_column() -> TextColumn:
    """What stands beside every bar."""
    return TextColumn("{task.fields[loss]}")


def command_line() -> str:
    """The command that was given, for the record, without passwords."""
    from einlinear_lab.runs.passwords import without_passwords

    return shlex.join(["einlinear", *map(without_passwords, sys.argv[1:])])


def check_place(on: str, workers: int | None, address: str | None, cpus: float | None, gpus: float | None) -> None:
    """Raise ValueError for a place to train that there is not, and for options that would do nothing there."""
    if on == "local":
        refuse({"--address": address, "--cpus": cpus, "--gpus": gpus}, "goes with --on ray")
    elif on == "ray":
        refuse({"--workers": workers}, "goes with --on local: on Ray --cpus and --gpus say how many runs fit")
        require(RAY)
    else:
        raise ValueError(f"--on must be local or ray, not {on!r}")


def refuse(options: Mapping[str, object], why: str) -> None:
    """Raise ValueError if one of these options was given."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} {why}")


def cluster(address: str | None, cpus: float | None, gpus: float | None) -> Pool:
    """Where --on ray trains."""
    from einlinear_lab.sweeps.cluster import Cluster

    return Cluster(address, 1 if cpus is None else cpus, gpus or 0, setup())


def processes(workers: int | None, runs: Sequence[Run]) -> Pool:
    """Where --on local trains."""
    from joblib import cpu_count

    from einlinear_lab.sweeps.workers import Workers, suited

    count = workers or suited(runs)
    return Workers(count, max(1, cpu_count() // count), setup())


def check_here(runs: Iterable[Run]) -> None:
    """What training would find wrong with this machine, before it starts.

    Raises:
        ValueError: there is no such device; the processes that torchrun started cannot share a batch.
        ModuleNotFoundError: a tracker's package is not installed.
    """
    from einlinear_lab.training.distributed import check_batch, check_device, processes
    from einlinear_lab.training.trackers import check_installed

    for run in runs:
        check_device(run.training.device)
        check_batch(run.data.batch_size, processes(), run.training.accumulate)
        if run.training.tracker:
            check_installed(run.training.tracker)


def say_skipped(runs: Iterable[Run]) -> None:
    """Name the files of the user's data that were left out."""
    for data in {run.data: None for run in runs}:
        skipped = data.skipped()
        if skipped:
            more = f" and {len(skipped) - _SHOWN} more" if skipped[_SHOWN:] else ""
            names = ", ".join(skipped[:_SHOWN])
            files = "1 file" if len(skipped) == 1 else f"{len(skipped)} files"
            display.warning(f"Left out {files} of {data.data} that cannot be read: {names}{more}.")


def carry_out(sweep: Sweep, folder: Path, workers: int | None, mix_code: bool, pool: Pool | None = None) -> None:
    """Do what is missing of a sweep, on processes of this machine unless another pool is given, and report."""
    from einlinear_lab.runs.check import check_runs
    from einlinear_lab.runs.store import Store
    from einlinear_lab.sweeps.driver import do

    store = Store(folder)
    with user_errors():
        if "RANK" in os.environ:
            raise ValueError("torchrun shares one run among its processes (einlinear train); start this without it")
        if pool is None:
            check_here(sweep.runs)
        store.open(sweep.runs, sweep.axes, command_line(), mix_code, check_runs(sweep.runs))
        for problem in store.damaged():
            display.warning(f"{problem}; if it belongs here it is done again")
        missing = store.missing(sweep.runs)
        say_skipped(sweep.runs)
    there = len(sweep.runs) - len(missing)
    already = f"; {there} of {len(sweep.runs)} are already there" if there else ""
    display.note(f"{len(missing)} runs to do, results in {folder}{already}.")
    if missing:
        pool = pool or processes(workers, missing)
        interrupted = f"Interrupted. {folder} keeps what was done; the same command goes on from there."
        with interruptible(interrupted), display.progress(loss_column()) as bars, system_errors():
            failed = do(sweep.runs, store, pool, Watch(bars, len(missing)).see)
        for event in failed:
            display.error(f"{event.run.name} failed: {event.message}")
    else:
        failed = []
    report.command([folder])
    if failed:
        raise typer.Exit(1)


class Watch:
    """Bars: one for all runs, one for each that is running."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._all = progress.add_task("runs", total=total, loss="")
        self._bars: dict[str, TaskID] = {}

    def see(self, event: Event) -> None:
        if event.status == "running":
            if event.run.key not in self._bars:
                self._bars[event.run.key] = self._progress.add_task(title(event.run), loss="")
            loss = f"loss {event.loss:.3f}" if event.step else ""
            self._progress.update(self._bars[event.run.key], completed=event.step, total=event.steps or None, loss=loss)
            return
        if event.run.key in self._bars:
            self._progress.remove_task(self._bars.pop(event.run.key))
        if event.status == "lost":
            display.warning(f"{title(event.run)}: {event.message}")
        else:
            self._progress.advance(self._all)


def title(run: Run) -> str:
    """A run in a few words."""
    return f"{run.model.structure}, width {run.model.width}, lr {run.training.lr:g}, seed {run.seed}"


@contextmanager
def bar(run: Run) -> Iterator[Callable[[int, int, float], None]]:
    """A bar for a single run, and the function that moves it."""
    with display.progress(loss_column()) as progress:
        task = progress.add_task(title(run), loss="")
        yield lambda step, steps, loss: progress.update(task, completed=step, total=steps, loss=f"loss {loss:.3f}")
