"""`einlinear compare`: its options, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from einlinear.cli.endings import user_errors
from einlinear.cli.packages import EXPERIMENTS, require
from einlinear.cli.parsing import assignments, numbers, specs
from einlinear.cli.running import carry_out

Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes that train at the same time. Default: one per CPU core, or GPU.")
]
MixCode = Annotated[
    bool, typer.Option("--mix-code", help="Add to runs that another version of the code made, or of changed sources.")
]


def compare(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=VALUE]...",
            help="Any other option of the runs, as for train: model=vit, lr=1e-3, batch_size=128, mixup=0.8, ...",
        ),
    ] = None,
    structures: Annotated[
        list[str] | None,
        typer.Option(
            help="Structures, separated by ';' (families also by ','), or the option several times. Default: dense; "
            "low_rank; kronecker; tt(rank=4); monarch; btt; dyad."
        ),
    ] = None,
    macs: Annotated[
        str | None,
        typer.Option(
            help="Compute targets: every structure gets its widest model within each. Default: 50k,100k,200k,400k."
        ),
    ] = None,
    widths: Annotated[str | None, typer.Option(help="Widths such as 64,128, instead of --macs.")] = None,
    dense_reach: Annotated[
        int | None, typer.Option(help="Dense also gets 2, 4, ... times the largest target, up to this. Default: 4.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="auto (Fashion-MNIST, or else digits), fashion-mnist, digits, a folder with CIFAR's .bin files, one "
            "with a subfolder of images per class, or a prepared text."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Results folder. One of the same settings is added to.")] = Path(
        "results/compare"
    ),
    preset: Annotated[
        str | None, typer.Option(help="demo (minutes) or paper (hours on a GPU); options given here override it.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Runs of every model. Default: 3.")] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training images. Default: 20. Or write steps=1000.")
    ] = None,
    workers: Workers = None,
    mix_code: MixCode = False,
) -> None:
    """Train structures side by side at matched compute, print the table, write report.html.

    Running the same command again trains only what is missing; structures, targets and seeds can be added.
    """
    require(EXPERIMENTS)
    from einlinear.experiments.sweeps.compare import configure, plan

    with user_errors():
        given: dict[str, Any] = {
            "structures": structures,
            "macs": macs,
            "widths": widths,
            "dense_reach": dense_reach,
            "data": data,
            "preset": preset,
            "seeds": seeds,
            "epochs": epochs,
            **assignments(settings),
        }
        lists: dict[str, Any] = {
            "structures": specs(given["structures"]),
            "macs": numbers(given["macs"], "--macs"),
            "widths": numbers(given["widths"], "--widths"),
        }
        sweep = plan(configure(**given | lists))
    carry_out(sweep, out, workers, mix_code)
