"""The commands: each has a file of its own, turns its options into calls of the library, and prints what comes back.

What trains or draws is heavy and needs further packages: the commands that use it import it themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

import einlinear
from einlinear.cli import display
from einlinear.cli.bench import bench
from einlinear.cli.compare import compare
from einlinear.cli.coord_check import coord_check
from einlinear.cli.endings import user_errors
from einlinear.cli.fit import fit
from einlinear.cli.importing import import_all
from einlinear.cli.prepare import prepare
from einlinear.cli.report import report
from einlinear.cli.train import recipes, sweep, train

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
        import_all(imports or ())


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


_OF_RUNS: tuple[Callable[..., None], ...] = (compare, train, sweep, coord_check)
_OTHERS: tuple[Callable[..., None], ...] = (recipes, fit, report, bench, prepare)
for command in _OF_RUNS:  # an option they do not know is one of a run, which says what is right
    app.command(context_settings={"ignore_unknown_options": True})(command)
for command in _OTHERS:
    app.command()(command)
