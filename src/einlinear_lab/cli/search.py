"""The command `einlinear search`."""

from __future__ import annotations

import math
import os
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from einlinear_lab.cli import display
from einlinear_lab.cli.arguments import MixCode, RunConfig, Workers
from einlinear_lab.cli.endings import interruptible, system_errors, user_errors
from einlinear_lab.cli.packages import LAB, require
from einlinear_lab.cli.parsing import assignments, numbers
from einlinear_lab.cli.running import (
    Watch,
    check_here,
    check_place,
    cluster,
    command_line,
    loss_column,
    processes,
    say_skipped,
)

if TYPE_CHECKING:
    from einlinear_lab.search.search import Search

# The number of trials that are printed.
_SHOWN = 10


def command(
    config: RunConfig = None,
    budget: Annotated[str, typer.Option(help="Multiply-accumulates for one input, of every model: 400k.")] = "100k",
    trials: Annotated[int, typer.Option(min=1, help="Number of models to train.")] = 60,
    hours: Annotated[float | None, typer.Option(help="Start no trial later than this. Default: no limit.")] = None,
    families: Annotated[
        str, typer.Option(help="Families to search: einsum (every theta), btt3, blast, dyad; separated by commas.")
    ] = "einsum",
    roles: Annotated[
        str | None,
        typer.Option(
            help="Linear layers that get a structure of their own: attention_in, attention_out, up, down; separated by "
            "commas. Default: one structure for all."
        ),
    ] = None,
    sampler: Annotated[
        str, typer.Option(help="Optuna's sampler: gp (Gaussian process), tpe (Parzen estimator) or random.")
    ] = "gp",
    warm_start: Annotated[
        bool, typer.Option(help="Try eight structures of the literature first (never with random).")
    ] = True,
    prune: Annotated[bool, typer.Option(help="Stop trials early that are behind half of the others.")] = True,
    metric: Annotated[str | None, typer.Option(help="Metric to minimise. Default: the error of the data.")] = None,
    time_weight: Annotated[
        float,
        typer.Option(
            help="Multiply the metric by the time of a training step to this power. Time is best measured with "
            "--workers 1."
        ),
    ] = 0.0,
    sampler_seed: Annotated[int, typer.Option(help="Seed of the sampler; that of the runs is seed=NUMBER.")] = 0,
    out: Annotated[Path, typer.Option(help="Results folder. The same command resumes the search in it.")] = Path(
        "results/search"
    ),
    storage: Annotated[
        str | None,
        typer.Option(
            help="Storage of the study: journal, or a database such as postgresql+psycopg://user@host/name. Default: "
            "SQLite in the results folder."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the study. Default: the folder's.")] = None,
    on: Annotated[str, typer.Option(help="Where to train: local (processes of this machine) or ray.")] = "local",
    workers: Workers = None,
    address: Annotated[str | None, typer.Option(help="Address of the Ray cluster. Default: a new one here.")] = None,
    cpus: Annotated[float | None, typer.Option(help="CPU cores for each run on Ray. Default: 1.")] = None,
    gpus: Annotated[float | None, typer.Option(help="GPUs for each run on Ray. Default: none.")] = None,
    mix_code: MixCode = False,
) -> None:
    """Search for the structure with the lowest loss at a budget of compute.

    All models cost the same: the width follows from the structure. Several of these commands may work on one folder,
    also on several machines that share it. NAME=VALUE are options of the runs, as for train.
    """
    require(LAB)
    from einlinear_lab.runs.run import with_defaults
    from einlinear_lab.runs.store import Store
    from einlinear_lab.runs.table import RunTable
    from einlinear_lab.search.config import SearchConfig
    from einlinear_lab.search.search import Search

    with user_errors():
        check_place(on, workers, address, cpus, gpus)
        macs = numbers(budget, "--budget") or ()
        if len(macs) != 1:
            raise ValueError(f"--budget is one number, such as 400k, not {budget!r}")
        if "RANK" in os.environ:
            raise ValueError("torchrun shares one run among its processes (einlinear train); start this without it")
        options, notes = with_defaults(assignments(config))
        chosen = SearchConfig(
            budget=macs[0],
            trials=trials,
            hours=hours,
            families=_words(families),
            roles=_words(roles or ""),
            sampler=sampler,
            warm_start=warm_start,
            prune=prune,
            metric=metric,
            time_weight=time_weight,
            seed=sampler_seed,
            options=options,
        )
        store = Store(out)
        search = Search(chosen)
        check_here([search.base])
        say_skipped([search.base])
        for note in notes:
            display.note(f"{note}.")
        search.open(store, storage, name, command=command_line(), mix_code=mix_code)
    pool = cluster(address, cpus, gpus) if on == "ray" else processes(workers, [search.base] * trials)
    done = len(search.study.trained())
    display.note(f"{done} of {trials} trials are done; results in {out}.")
    interrupted = f"Interrupted. {out} keeps the results; the same command resumes the search."
    with interruptible(interrupted), display.progress(loss_column()) as bars, system_errors():
        failed = search.do(pool, Watch(bars, max(0, trials - done)).see)
    with suppress(BlockingIOError), store.driving(), RunTable(out) as table:
        table.rebuild(store.records(), [])
    for event in failed:
        display.error(f"{event.run.name} failed: {event.message}")
    _print(search)
    if failed:
        raise typer.Exit(1)


def _words(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.replace(" ", "").split(",")))


def _print(search: Search) -> None:
    trials = search.study.trained()
    finite = [trial for trial in trials if trial.value is not None and trial.value < math.inf]
    if not finite:
        display.note("No trial is finished.")
        return
    best = sorted(finite, key=lambda trial: trial.value or 0.0)
    options = [*best[0].architecture.specs]
    weight = search.manifest.time_weight
    objective = f"{search.manifest.metric}" + (f" × seconds^{weight:g}" if weight else "")
    rows = [
        (
            *(trial.architecture.specs[option] for option in options),
            f"{trial.value:.4f}",
            f"{trial.architecture.width:,}",
            f"{trial.architecture.macs:,}",
            *(f"{exponent:.3g}" for exponent in trial.architecture.exponents),
        )
        for trial in best[:_SHOWN]
    ]
    display.show((*options, objective, "width", "MACs", "psi", "nu", "omega"), rows)
    display.note(f"{len(trials)} trials, {len(trials) - len(best)} of them pruned, diverged or still running.")
    if len(trials) < search.config.trials:
        display.note("There are fewer than asked for: time was up, runs failed, or no other structure fits the budget.")
    winner = best[0].architecture
    if options[1:]:
        display.note("\nThe best: " + " ".join(f"{option}={winner.specs[option]!r}" for option in options))
    else:
        display.note(f"\nTo use the best:\n    import einlinear as el\n    el.convert(model, {winner.spec!r})")
    structures = f"dense; btt; monarch; from-study:{search.store.folder}"
    words = ["einlinear", "compare", "--structures", structures, "--out", "results/confirmed"]
    display.note(f"To confirm it with several seeds:\n    {shlex.join(words)}")
