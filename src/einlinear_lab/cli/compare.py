"""The command `einlinear compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from einlinear_lab.cli import display
from einlinear_lab.cli.packages import LAB, require
from einlinear_lab.cli.parsing import Interleave, MixCode, Workers, assignments, numbers, specs
from einlinear_lab.cli.running import run_sweep


def compare_command(
    config: Annotated[list[str] | None, typer.Argument(metavar="NAME=VALUE")] = None,
    structures: list[str] | None = None,
    macs: str | None = None,
    widths: str | None = None,
    dense_reach: int | None = None,
    data: str | None = None,
    out: Path = Path("results/compare"),
    preset: str | None = None,
    seeds: int | None = None,
    epochs: int | None = None,
    interleave: Interleave = False,
    workers: Workers = None,
    mix_code: MixCode = False,
) -> None:
    """Train structures side by side at matched compute, print a table and write report.html.

    The same command again trains only what is missing; structures, MACs and seeds can be added to a results folder.

    Args:
        config: Any other option of the runs, as for train: model=vit, lr=1e-3, batch_size=128, mixup=0.8, ...
        structures: Structures, separated by ';' (names of families also by ','); may be repeated; from-study:FOLDER (or
            a name in results): the three best of a search, whose options become the defaults, and without --macs all
            others at its compute. Default: dense; low_rank; kronecker; tt(rank=4); monarch; btt; dyad.
        macs: Multiply-accumulates per input: for each of these, every structure gets its widest model within it.
            Default: 50k,100k,200k,400k.
        widths: Instead of --macs: the widths of the models, such as 64,128.
        dense_reach: Dense models also get 2, 4, ... times the largest of --macs, up to this multiple. Default: 4.
        data: auto (Fashion-MNIST if it can be had, otherwise digits), fashion-mnist, digits, or a folder: with CIFAR's
            .bin files, with a subfolder of images for each class, or with a prepared text. Default: auto.
        out: Results folder. Runs are added to what it holds.
        preset: demo (minutes) or paper (hours on a GPU); options given here override it.
        seeds: Runs of each model, which differ in their seed. Default: 3.
        epochs: Passes over the training images, unless steps=NUMBER is given. Default: 20.
    """
    given = dict[str, Any](structures=structures, macs=macs, widths=widths, dense_reach=dense_reach, preset=preset)
    given |= {
        "seeds": seeds,
        "epochs": epochs,
        "interleave": interleave or None,
        **({} if data is None else {"data": data}),
    }
    require(LAB)
    from einlinear_lab.search.leaders import alongside, as_searched, split_leaders, unseen_seed
    from einlinear_lab.sweeps.compare import CompareConfig, configure, plan

    with display.user_errors():
        options = given | assignments(config)
        others, best = split_leaders(specs(options["structures"]) or ())
        sized: list[dict[str, Any]] = []
        if best:
            options = as_searched(best, options)
            not_of_runs = {*CompareConfig.__dataclass_fields__, "preset"}
            run_options = {name: value for name, value in options.items() if name not in not_of_runs}
            options.setdefault("first_seed", unseen_seed(best))
            is_matched = options.get("macs") is None and options.get("widths") is None
            sized = alongside(best, others if is_matched else (), run_options)
            others = () if is_matched else others
        options |= {
            "structures": others or (() if best else None),
            "sized": tuple(sized) or None,
            "macs": numbers(options.get("macs"), "--macs"),
            "widths": numbers(options.get("widths"), "--widths"),
        }
        comparison = configure(**options)
        sweep = plan(comparison)
    run_sweep(sweep, out, workers, mix_code, interleave=comparison.interleave)
