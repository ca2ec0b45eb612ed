"""`einlinear train`, `sweep` and `recipes`: one run, many, and those of the literature."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from einlinear.cli import display
from einlinear.cli.compare import MixCode, Workers
from einlinear.cli.endings import interruptible, system_errors, user_errors
from einlinear.cli.importing import setup
from einlinear.cli.packages import EXPERIMENTS, RAY, require
from einlinear.cli.parsing import assignments
from einlinear.cli.running import bar, carry_out

Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[NAME=VALUE]...",
        help="model=mlp, vit or gpt; data=NAME, a folder or a prepared text; structure, width, depth, steps, lr, "
        "batch_size, seed, ...: a name that is unknown is answered with all there are.",
    ),
]


def train(
    settings: Settings = None,
    out: Annotated[Path, typer.Option(help="Folder of the run: its checkpoints, metrics and result.")] = Path(
        "results/train"
    ),
) -> None:
    """Train one model; interrupted, the same command goes on from the last checkpoint (checkpoint_every=100).

    Under torchrun, all its processes train together: parallel=ddp or parallel=fsdp.

    For example:  einlinear train model=gpt data=data/english structure="btt(rank=2)" width=256 steps=2000 lr=3e-3
    """
    require(EXPERIMENTS)
    from einlinear.experiments.runs.check import check_runs
    from einlinear.experiments.runs.execute import execute
    from einlinear.experiments.runs.records import check_folder, describe
    from einlinear.experiments.runs.run import Run
    from einlinear.training.distributed import check_device, is_first

    with user_errors():
        run = Run.of(assignments(settings))
        check_runs([run])
        check_device(run.training.device)
        check_folder(describe(out, run, run.data.load(run.seed)))
    interrupted = "Interrupted. The same command goes on from the last checkpoint, if checkpoint_every was set."
    with interruptible(interrupted), bar(run) as progress, system_errors():
        result = execute(run, out, progress, keep_checkpoints=True)
    if is_first():
        display.result(run, result)


def sweep(
    what: Annotated[str, typer.Argument(metavar="FILE|RECIPE", help="A .toml or .json file, or a recipe's name.")],
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Results folder. Default: results/ and the name.")] = None,
    scale: Annotated[str | None, typer.Option(help="Of a recipe: small (default) or paper.")] = None,
    on: Annotated[str, typer.Option(help="local (processes of this machine) or ray (a cluster).")] = "local",
    workers: Workers = None,
    address: Annotated[str | None, typer.Option(help="Of the Ray cluster. Default: a new one on this machine.")] = None,
    cpus: Annotated[float | None, typer.Option(help="CPU cores of a run on Ray. Default: 1.")] = None,
    gpus: Annotated[float | None, typer.Option(help="GPUs of a run on Ray. Default: none.")] = None,
    mix_code: MixCode = False,
) -> None:
    """Do all runs that a file or a recipe describes; those that are finished are left as they are.

    While it runs, FOLDER/runs.sqlite is a table of all runs. Interrupted, or with its processes killed, the same
    command does what is missing.
    """
    require(EXPERIMENTS)
    from einlinear.experiments.sweeps import recipes
    from einlinear.experiments.sweeps.sweep import read_sweep

    with user_errors():
        if on not in ("local", "ray"):
            raise ValueError(f"--on must be local or ray, not {on!r}")
        is_file = Path(what).suffix in (".toml", ".json")
        if on == "local":
            _refuse({"--address": address, "--cpus": cpus, "--gpus": gpus}, "goes with --on ray")
        else:
            _refuse({"--workers": workers}, "goes with --on local: on Ray --cpus and --gpus say how many runs fit")
        if is_file:
            _refuse({"--scale": scale}, f"is that of a recipe, and {what} is a file")
        if on == "ray":
            require(RAY)
        overrides, scale = assignments(settings), scale or "small"
        found = read_sweep(what, overrides) if is_file else recipes.sweep(what, scale, overrides)
        if not is_file and (how := getattr(recipes.load(what), scale).prepare):
            display.note(f"Its data has to be there: {how}")
        name = Path(what).stem if is_file else f"{what}-{scale}"
    pool = None
    if on == "ray":
        from einlinear.experiments.sweeps.cluster import Cluster

        pool = Cluster(address, 1 if cpus is None else cpus, gpus or 0, setup())
    carry_out(found, out or Path("results") / name, workers, mix_code, pool)


def _refuse(options: Mapping[str, object], why: str) -> None:
    """Raise ValueError if one of these options was given, which would do nothing."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} {why}")


def recipes() -> None:
    """List the experiments of the literature that `sweep` knows by name, with what each should show."""
    require(EXPERIMENTS)
    from einlinear.experiments.sweeps import recipes as known

    for name in known.names():
        recipe = known.load(name)
        commands = recipe.small.commands or (f"einlinear sweep {name}",)
        minutes = f"{recipe.small.minutes} minutes on two cores" if recipe.small.minutes else "not timed"
        display.note(f"{name}: {recipe.title.strip()} ({recipe.source.strip()})")
        display.note(f"    {recipe.shows.strip()}")
        display.note(f"    {'; '.join(commands)}    ({minutes}; --scale paper is the original)\n")
