"""The command `einlinear sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from einlinear_lab.cli import display
from einlinear_lab.cli.arguments import MixCode, RunConfig, Workers
from einlinear_lab.cli.endings import user_errors
from einlinear_lab.cli.packages import LAB, require
from einlinear_lab.cli.parsing import assignments
from einlinear_lab.cli.running import carry_out, check_place, cluster, refuse


def command(
    what: Annotated[str, typer.Argument(metavar="FILE|RECIPE", help="A .toml or .json file, or the name of a recipe.")],
    config: RunConfig = None,
    out: Annotated[
        Path | None, typer.Option(help="Results folder. Default: results/FILE, or results/RECIPE-SCALE.")
    ] = None,
    scale: Annotated[
        str | None, typer.Option(help="Of a recipe: small (minutes to hours on two cores; the default) or paper.")
    ] = None,
    on: Annotated[
        str, typer.Option(help="Where to train: local (processes of this machine) or ray (a cluster).")
    ] = "local",
    workers: Workers = None,
    address: Annotated[
        str | None, typer.Option(help="Address of the Ray cluster. Default: a new one on this machine.")
    ] = None,
    cpus: Annotated[float | None, typer.Option(help="CPU cores for each run on Ray. Default: 1.")] = None,
    gpus: Annotated[float | None, typer.Option(help="GPUs for each run on Ray. Default: none.")] = None,
    mix_code: MixCode = False,
) -> None:
    """Do all runs of a sweep file or a recipe, and report on them.

    The same command again does only what is missing, also after an interruption. All the while, runs.sqlite in the
    results folder is a table of the runs. NAME=VALUE overrides what the file or recipe says.
    """
    require(LAB)
    from einlinear_lab.sweeps import recipes
    from einlinear_lab.sweeps.sweep import read_sweep

    with user_errors():
        check_place(on, workers, address, cpus, gpus)
        is_file = Path(what).suffix in (".toml", ".json")
        if is_file:
            refuse({"--scale": scale}, f"is that of a recipe, and {what} is a file")
        overrides, scale = assignments(config), scale or "small"
        sweep = read_sweep(what, overrides) if is_file else recipes.sweep(what, scale, overrides)
        if not is_file and (prepare := getattr(recipes.load(what), scale).prepare):
            display.note(f"Its data has to be there: {prepare}")
        name = Path(what).stem if is_file else f"{what}-{scale}"
    pool = cluster(address, cpus, gpus) if on == "ray" else None
    carry_out(sweep, out or Path("results") / name, workers, mix_code, pool)
