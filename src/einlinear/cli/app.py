"""The commands. Each one turns its options into one call of the library, and prints what comes back.

What trains or draws is heavy and needs further packages: the commands that use it import it themselves.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import einlinear
from einlinear.cli import display
from einlinear.cli.bench import bench
from einlinear.cli.endings import interruptible, user_errors
from einlinear.cli.importing import import_user_code
from einlinear.cli.packages import EXPERIMENTS, require
from einlinear.cli.parsing import numbers, specs
from einlinear.cli.prepare import prepare as prepare_text
from einlinear.experiments.config import Config, Settings, configure

app = typer.Typer(
    help="Structured linear layers: what they cost, and what they are worth on a budget of compute.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a bug shows its plain traceback
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"einlinear {einlinear.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    imports: Annotated[
        list[str] | None,
        typer.Option(
            "--import",
            metavar="MODULE_OR_FILE",
            help="A module, or a .py file, that registers families of yours. May be given several times.",
        ),
    ] = None,
) -> None:
    with user_errors():
        for target in imports or ():
            import_user_code(target)


@app.command()
def describe(
    spec: Annotated[str, typer.Argument(help='A structure, such as "btt(rank=2)", or a pattern.')],
    in_features: Annotated[int, typer.Argument(help="Input features of the layer.")],
    out_features: Annotated[int, typer.Argument(help="Output features of the layer.")],
    max_macs: Annotated[
        float | None, typer.Option(help="Choose the richest rank within this fraction of the MACs of dense.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Also say how it is run on this machine's CPU.")] = False,
    tokens: Annotated[int, typer.Option(help="For --plan: how many inputs at a time.", min=1)] = 2048,
) -> None:
    """Say what a structure is at one size: factors, parameters, MACs, rank, exponents, learning rates, beside dense."""
    with user_errors():
        structure = einlinear.structure(spec, in_features, out_features, max_macs=max_macs)
    display.structure(structure)
    if plan:
        display.plan(structure, tokens)


def _option(help: str, name: str) -> Any:
    """An option of `compare` whose default is that of the field of `Config` or `Settings` with this name."""
    default = getattr(Settings, name, getattr(Config, name, None))
    if isinstance(default, tuple):
        default = ("; " if name == "structures" else ",").join(map(str, default))
    return typer.Option(help=help if default is None else f"{help} Default: {default}.")


@app.command()
def compare(
    structures: Annotated[
        list[str] | None,
        _option("Structures, separated by ';' (families also by ','), or the option several times.", "structures"),
    ] = None,
    macs: Annotated[
        str | None,
        _option("Compute targets such as 50k,1.5M: every structure gets its widest model within each.", "macs"),
    ] = None,
    widths: Annotated[str | None, typer.Option(help="Widths such as 64,128, instead of --macs.")] = None,
    dense_reach: Annotated[
        int | None, _option("Dense also gets 2, 4, ... times the largest target, up to this many.", "dense_reach")
    ] = None,
    data: Annotated[
        str | None,
        _option(
            "auto, fashion-mnist, digits, a folder with CIFAR's .bin files, or one subfolder of images per class.",
            "data",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Results folder. One of the same settings is added to.")] = Path(
        "results/compare"
    ),
    preset: Annotated[
        str | None, typer.Option(help="demo (minutes) or paper (hours on a GPU); options given here override it.")
    ] = None,
    seeds: Annotated[int | None, _option("Runs of every model.", "seeds")] = None,
    epochs: Annotated[int | None, _option("Passes over the training images.", "epochs")] = None,
    batch_size: Annotated[int | None, _option("Images in a batch.", "batch_size")] = None,
    lr: Annotated[float | None, _option("Learning rate of the dense model of base width.", "lr")] = None,
    base_width: Annotated[int | None, _option("The width that learning rate was found at.", "base_width")] = None,
    schedule: Annotated[str | None, _option("Of the learning rate: cosine (to zero) or constant.", "schedule")] = None,
    depth: Annotated[int | None, _option("Residual blocks.", "depth")] = None,
    mixup: Annotated[float | None, _option("Largest share of a second image, 0 to 1.", "mixup")] = None,
    label_smoothing: Annotated[float | None, _option("0 to 1.", "label_smoothing")] = None,
    image_size: Annotated[int | None, _option("Resize the images to this many pixels a side.", "image_size")] = None,
    limit: Annotated[int | None, _option("Use only this many training images.", "limit")] = None,
    device: Annotated[str | None, _option("cpu or cuda.", "device")] = None,
    threads: Annotated[int | None, _option("CPU threads; more than one pays for wide models only.", "threads")] = None,
) -> None:
    """Train structures side by side at matched compute, print the table, write report.html.

    Running the same command again trains only what is missing; structures, targets and seeds can be added.
    """
    require(EXPERIMENTS)
    from einlinear.experiments.compare import prepare

    with user_errors():
        config = configure(
            preset,
            structures=specs(structures),
            macs=numbers(macs, "--macs"),
            widths=numbers(widths, "--widths"),
            dense_reach=dense_reach,
            data=data,
            seeds=seeds,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            base_width=base_width,
            schedule=schedule,
            depth=depth,
            mixup=mixup,
            label_smoothing=label_smoothing,
            image_size=image_size,
            limit=limit,
            device=device,
            threads=threads,
        )
        comparison = prepare(config, out, shlex.join(["einlinear", *sys.argv[1:]]))
    missing = comparison.missing()
    display.start(comparison, missing)
    with interruptible(f"Interrupted. {out} keeps every finished run; the same command goes on from there."):
        display.train(comparison, missing)
    _report(out)


@app.command()
def coord_check(
    structures: Annotated[
        list[str] | None, typer.Option(help="As for compare. Default: dense; low_rank; kronecker; monarch; btt.")
    ] = None,
    widths: Annotated[str, typer.Option(help="Widths to compare.")] = "64,256,1024",
    steps: Annotated[int, typer.Option(help="Training steps at each width, at least 2.")] = 100,
    data: Annotated[str, typer.Option(help="As for compare.")] = "auto",
    batch_size: Annotated[int | None, _option("Images in a batch.", "batch_size")] = None,
    lr: Annotated[float | None, _option("Learning rate of the dense model of base width.", "lr")] = None,
    base_width: Annotated[int | None, _option("The width that learning rate was found at.", "base_width")] = None,
    depth: Annotated[int | None, _option("Residual blocks.", "depth")] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("results/coord-check.html"),
) -> None:
    """Measure how much a training step moves the features at several widths, and plot it.

    With structure-aware learning rates the change should be about the same at every width; as a control, every
    structure is also trained with those of dense.
    """
    require(EXPERIMENTS)
    from einlinear.data import Batches, load_images
    from einlinear.experiments.coordinates import cases, check, measure, write_page

    with user_errors():
        config = configure(
            structures=specs(structures) or ("dense", "low_rank", "kronecker", "monarch", "btt"),
            widths=numbers(widths, "--widths"),
            data=data,
            batch_size=batch_size,
            lr=lr,
            base_width=base_width,
            depth=depth,
        )
        if out.is_dir():
            raise ValueError(f"--out {out} is a folder; name a file, such as {out / 'coord-check.html'}")
        images = load_images(config.data)
        Batches(images, config.settings.batch_size, seed=0)  # refuses a batch that is too large
        check(images, config.structures, config.widths, config.settings.depth, steps)
        out.parent.mkdir(parents=True, exist_ok=True)
    with (
        interruptible("Interrupted."),
        display.steps(len(cases(config.structures)) * len(config.widths) * steps) as step,
    ):
        updates = list(measure(images, config.structures, config.widths, config.settings, steps, step))
    display.updates(updates)
    write_page(updates, out)
    display.note(f"Figure: {out}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A results folder.")]) -> None:
    """Print the table of a results folder, and write its report.html again."""
    _report(folder)


def _report(folder: Path) -> None:
    require(EXPERIMENTS)
    from einlinear.experiments.report import write_report
    from einlinear.experiments.store import read_experiment, read_results
    from einlinear.experiments.summary import summarise

    with user_errors():
        page = write_report(folder)
        curves = summarise(read_results(folder)[0], read_experiment(folder).structures)
    display.results(curves)
    display.note(f"Report: {page}")


app.command()(bench)
app.command("prepare")(prepare_text)
