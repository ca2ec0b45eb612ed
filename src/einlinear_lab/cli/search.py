"""`einlinear search`: its options, and what it prints."""

from __future__ import annotations

import math
import os
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from einlinear_lab.cli import display
from einlinear_lab.cli.endings import interruptible, system_errors, user_errors
from einlinear_lab.cli.options import MixCode, Settings, Workers
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

_SHOWN = 10  # of the candidates


def command(
    settings: Settings = None,
    budget: Annotated[str, typer.Option(help="Multiply-accumulates for one input, of every model: 400k.")] = "100k",
    trials: Annotated[int, typer.Option(min=1, help="Candidates to train.")] = 60,
    hours: Annotated[float | None, typer.Option(help="After these no further one is begun. Default: no limit.")] = None,
    families: Annotated[
        str, typer.Option(help="What is searched: einsum (every theta), btt3, blast, dyad; separated by commas.")
    ] = "einsum",
    roles: Annotated[
        str | None,
        typer.Option(
            help="Linear layers that get a structure of their own: attention_in, attention_out, up, down; separated by "
            "commas. Default: one structure for all."
        ),
    ] = None,
    sampler: Annotated[
        str, typer.Option(help="How candidates are chosen: predictor (of psi, nu, omega and sizes), tpe, random.")
    ] = "predictor",
    known: Annotated[bool, typer.Option(help="Begin with eight structures of the literature (not if random).")] = True,
    prune: Annotated[bool, typer.Option(help="End runs early that are behind half of the others.")] = True,
    measure: Annotated[str | None, typer.Option(help="What is to be least. Default: the error of the data.")] = None,
    time_weight: Annotated[
        float,
        typer.Option(
            help="How much the time of a training step counts: the measure is multiplied by it to this power. Time is "
            "best measured with --workers 1."
        ),
    ] = 0.0,
    choice_seed: Annotated[int, typer.Option(help="Seed of the choice; that of the runs is seed=NUMBER.")] = 0,
    out: Annotated[Path, typer.Option(help="Results folder. The same command goes on with what it holds.")] = Path(
        "results/search"
    ),
    storage: Annotated[
        str | None,
        typer.Option(
            help="Of the study: journal, or a database such as postgresql+psycopg://user@host/name. Default: SQLite, "
            "in the results folder."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the study. Default: the folder's.")] = None,
    on: Annotated[str, typer.Option(help="Where to train: local (processes of this machine) or ray.")] = "local",
    workers: Workers = None,
    address: Annotated[str | None, typer.Option(help="Address of the Ray cluster. Default: a new one here.")] = None,
    cpus: Annotated[float | None, typer.Option(help="CPU cores for each run on Ray. Default: 1.")] = None,
    gpus: Annotated[float | None, typer.Option(help="GPUs for each run on Ray. Default: none.")] = None,
    mix_code: MixCode = False,
) -> None:
    """Search the space of structures for the lowest loss at a budget of compute.

    Every candidate's model costs the same: its width follows from its structure. Several of these commands may work
    on one folder, also on several machines that share it. NAME=VALUE are options of the runs, as for train.
    """
    require(LAB)
    from einlinear_lab.runs.defaults import with_defaults
    from einlinear_lab.runs.store import Store
    from einlinear_lab.runs.table import RunTable
    from einlinear_lab.search.search import Config, Search

    with user_errors():
        check_place(on, workers, address, cpus, gpus)
        macs = numbers(budget, "--budget") or ()
        if len(macs) != 1:
            raise ValueError(f"--budget is one number, such as 400k, not {budget!r}")
        if "RANK" in os.environ:
            raise ValueError("torchrun shares one run among its processes (einlinear train); start this without it")
        completed, why = with_defaults(assignments(settings))
        chosen = Config(
            budget=macs[0],
            trials=trials,
            hours=hours,
            families=_words(families),
            roles=_words(roles or ""),
            sampler=sampler,
            known=known,
            prune=prune,
            measure=measure,
            time_weight=time_weight,
            seed=choice_seed,
            options=completed,
        )
        store = Store(out)
        found = Search(chosen)
        check_here([found.base])
        say_skipped([found.base])
        for sentence in why:
            display.note(f"{sentence}.")
        found.open(store, storage, name, command=command_line(), mix_code=mix_code)
    pool = cluster(address, cpus, gpus) if on == "ray" else processes(workers, [found.base] * trials)
    there = len(found.study.tried())
    display.note(f"{there} of {trials} candidates are there; results in {out}.")
    interrupted = f"Interrupted. {out} keeps what was done; the same command goes on from there."
    with interruptible(interrupted), display.progress(loss_column()) as bars, system_errors():
        failed = found.do(pool, Watch(bars, max(0, trials - there)).see)
    with suppress(BlockingIOError), store.driving(), RunTable(out) as table:
        table.rebuild(store.records(), [])
    for event in failed:
        display.error(f"{event.run.name} failed: {event.message}")
    _print(found)
    if failed:
        raise typer.Exit(1)


def _objective(search: Search) -> str:
    weight = search.settings.time_weight
    return f"{search.settings.measure}" + (f" × seconds^{weight:g}" if weight else "")


def _words(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.replace(" ", "").split(",")))


def _print(search: Search) -> None:
    tried = search.study.tried()
    best = sorted((own for own in tried if own.value not in (None, math.inf)), key=lambda own: own.value or 0.0)
    if not best:
        display.note("No candidate is finished.")
        return
    options = [*best[0].candidate.specs]
    rows = [
        (
            *(own.candidate.specs[option] for option in options),
            f"{own.value:.4f}",
            f"{own.candidate.width:,}",
            f"{own.candidate.macs:,}",
            *(f"{exponent:.3g}" for exponent in own.candidate.exponents[options[0]]),
        )
        for own in best[:_SHOWN]
    ]
    display.show((*options, _objective(search), "width", "MACs", "psi", "nu", "omega"), rows)
    ended = len(tried) - len(best)
    display.note(f"{len(tried)} candidates, {ended} of them ended early, diverged or still running.")
    if len(tried) < search.config.trials:
        display.note(
            "There are fewer than asked for: time was up, runs failed, or no others were found for the budget."
        )
    if search.trust is not None:
        display.note(f"The predictor: {search.trust}.")
    winner = best[0].candidate
    if options[1:]:
        display.note("\nThe best: " + " ".join(f"{option}={winner.specs[option]!r}" for option in options))
    else:
        display.note(f"\nTo use the best:\n    import einlinear as el\n    el.convert(model, {winner.spec!r})")
    where = f"from-study:{search.store.folder}"
    words = ["einlinear", "compare", "--structures", f"dense; btt; monarch; {where}", "--out", "results/confirmed"]
    display.note(f"To confirm it with several seeds:\n    {shlex.join(words)}")
