"""The commands `einlinear sweep` and `einlinear recipes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from einlinear_lab.cli import display
from einlinear_lab.cli.packages import LAB, require
from einlinear_lab.cli.parsing import Address, Cpus, Gpus, Interleave, MixCode, On, RunConfig, Workers, assignments
from einlinear_lab.cli.running import ray_pool, refuse, run_sweep


def sweep_command(
    what: Annotated[str, typer.Argument(metavar="FILE|RECIPE")],
    config: RunConfig = None,
    out: Path | None = None,
    scale: str | None = None,
    interleave: Interleave = False,
    on: On = "local",
    workers: Workers = None,
    address: Address = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    mix_code: MixCode = False,
) -> None:
    """Do all runs of a sweep file or a recipe, and report on them.

    The same command again does only what is missing, also after an interruption. All the while, runs.sqlite in the
    results folder is a table of the runs. NAME=VALUE overrides what the file or recipe says.

    Args:
        what: A .toml or .json file, or the name of a recipe.
        out: Results folder. Default: results/FILE, or results/RECIPE-SCALE.
        scale: Of a recipe: small (minutes to hours on two cores; the default) or paper.
    """
    require(LAB)
    from einlinear_lab.sweeps import recipes
    from einlinear_lab.sweeps.sweep import read_sweep

    with display.user_errors():
        pool = ray_pool(on, workers, address, cpus, gpus)
        if interleave and pool is not None:
            raise ValueError("--interleave goes with --on local")
        is_file = Path(what).suffix in (".toml", ".json")
        if is_file:
            refuse({"--scale": scale}, f"is that of a recipe, and {what} is a file")
        overrides, scale = assignments(config), scale or "small"
        sweep = read_sweep(what, overrides) if is_file else recipes.sweep(what, scale, overrides)
        if not is_file and (prepare := getattr(recipes.load(what), scale).prepare):
            display.note(f"Its data has to be there: {prepare}")
        name = Path(what).stem if is_file else f"{what}-{scale}"
    run_sweep(sweep, out or Path("results") / name, workers, mix_code, pool, interleave)


def recipes_command() -> None:
    """List the experiments from papers that `einlinear sweep` knows by name, and what each should show."""
    require(LAB)
    from einlinear_lab.sweeps.recipes import load, names

    for name in names():
        recipe = load(name)
        commands = recipe.small.commands or (f"einlinear sweep {name}",)
        minutes = f"{recipe.small.minutes} minutes on two cores" if recipe.small.minutes else "not timed"
        display.note(f"{name}: {recipe.title.strip()} ({recipe.source.strip()})")
        display.note(f"    {recipe.shows.strip()}")
        display.note(f"    {'; '.join(commands)}    ({minutes}; --scale paper is the original)\n")
