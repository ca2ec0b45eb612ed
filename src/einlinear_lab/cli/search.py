"""The command `einlinear search`."""

from __future__ import annotations

import math
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from einlinear_lab.cli import display
from einlinear_lab.cli.packages import LAB, require
from einlinear_lab.cli.parsing import Address, Cpus, Gpus, MixCode, On, RunConfig, Workers, assignments, numbers, words
from einlinear_lab.cli.running import check_many, command_line, ray_pool, watched

if TYPE_CHECKING:
    from einlinear_lab.search.search import Search

# The number of trials that are printed.
_SHOWN = 10


def search_command(
    config: RunConfig = None,
    budget: str = "100k",
    trials: Annotated[int, typer.Option(min=1)] = 60,
    hours: float | None = None,
    families: str = "einsum",
    roles: str | None = None,
    sampler: str = "gp",
    warm_start: bool = True,
    prune: bool = True,
    metric: str | None = None,
    time_weight: float = 0.0,
    sampler_seed: int = 0,
    out: Path = Path("results/search"),
    storage: str | None = None,
    name: str | None = None,
    on: On = "local",
    workers: Workers = None,
    address: Address = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    mix_code: MixCode = False,
) -> None:
    """Search for the structure with the lowest loss at a budget of compute.

    All models cost the same: the width follows from the structure. Several of these commands may work on one folder,
    also on several machines that share it. NAME=VALUE are options of the runs, as for train.

    Args:
        budget: Multiply-accumulates for one input, of every model: 400k.
        trials: Number of models to train.
        hours: Start no trial later than this. Default: no limit.
        families: Families to search: einsum (every theta), btt3, blast, dyad; separated by commas.
        roles: Linear layers that get a structure of their own: attention_in, attention_out, up, down; separated by
            commas. Default: one structure for all.
        sampler: Optuna's sampler: gp (Gaussian process), tpe (Parzen estimator) or random.
        warm_start: Try eight structures of the literature first (never with random).
        prune: Stop trials early that are behind half of the others.
        metric: Metric to minimise. Default: the error of the data.
        time_weight: Multiply the metric by the time of a training step to this power. Time is best measured with
            --workers 1.
        sampler_seed: Seed of the sampler; that of the runs is seed=NUMBER.
        out: Results folder. The same command resumes the search in it.
        storage: Storage of the study: journal, or a database such as postgresql+psycopg://user@host/name. Default:
            SQLite in the results folder.
        name: Name of the study. Default: the folder's.
    """
    require(LAB)
    from einlinear_lab.runs.options import parse
    from einlinear_lab.runs.run import with_defaults
    from einlinear_lab.runs.store import Store
    from einlinear_lab.runs.table import RunTable
    from einlinear_lab.search.config import SearchConfig
    from einlinear_lab.search.search import Search

    with display.user_errors():
        pool = ray_pool(on, workers, address, cpus, gpus)
        macs = numbers(budget, "--budget") or ()
        if len(macs) != 1:
            raise ValueError(f"--budget is one number, such as 400k, not {budget!r}")
        options, notes = with_defaults(assignments(config))
        budgets = {"budget": macs[0], "trials": trials, "hours": hours, "metric": metric, "time_weight": time_weight}
        space = {"families": words(families) or (), "roles": words(roles) or (), "options": options}
        sampling = {"sampler": sampler, "warm_start": warm_start, "prune": prune, "seed": sampler_seed}
        store, search = Store(out), Search(parse(SearchConfig, {**budgets, **space, **sampling}))
        check_many([search.base], pool)
        for note in notes:
            display.note(f"{note}.")
        search.open(store, storage, name, command=command_line(), mix_code=mix_code)
    done = len(search.study.trained())
    display.note(f"{done} of {trials} trials are done; results in {out}.")
    failed = watched(search.run_trials, [search.base] * trials, out, workers, pool, done)
    with suppress(BlockingIOError), store.driving(), RunTable(out) as table:
        table.rebuild(store.records(), [])
    _print(search)
    display.fail(failed)


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
    rows = []
    for trial in best[:_SHOWN]:
        found = trial.architecture
        specs = (found.specs[option] for option in options)
        exponents = (f"{exponent:.3g}" for exponent in found.exponents)
        rows.append((*specs, f"{trial.value:.4f}", f"{found.width:,}", f"{found.macs:,}", *exponents))
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
    command = ["einlinear", "compare", "--structures", structures, "--out", "results/confirmed"]
    display.note(f"To confirm it with several seeds:\n    {shlex.join(command)}")
