"""The commands: each has a file of its own, turns its options into calls of the library, and prints what comes back.

What trains or draws is heavy and needs further packages: the commands that use it import it themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

import einlinear
from einlinear.cli.bench import bench
from einlinear.cli.compare import compare
from einlinear.cli.compress import compress
from einlinear.cli.coord_check import coord_check
from einlinear.cli.describe import describe
from einlinear.cli.endings import user_errors
from einlinear.cli.fit import fit
from einlinear.cli.importing import import_all
from einlinear.cli.map import map_
from einlinear.cli.prepare import prepare
from einlinear.cli.recipes import recipes
from einlinear.cli.report import report
from einlinear.cli.search import search
from einlinear.cli.sweep import sweep
from einlinear.cli.train import train

app = typer.Typer(
    help="Structured linear layers: what they cost, and what they are worth on a budget of compute.\n\n"
    'To begin with:  einlinear describe "btt(rank=2)" 1024 4096  or  einlinear compare --preset demo',
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
            help="A module or .py file that registers your own families. Goes before the command; may be repeated.",
        ),
    ] = None,
) -> None:
    with user_errors():
        import_all(imports or ())


# an option that these do not know is one of a run, which says what is right
_OF_RUNS = (compare, train, sweep, search, coord_check)
_PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "Layers": (describe, bench),
    "Training": (prepare, compare, train, sweep, search, recipes, coord_check),
    "Results": (report, map_, fit),
    "Pretrained models": (compress,),
}
for panel, commands in _PANELS.items():
    for command in commands:
        settings = {"ignore_unknown_options": command in _OF_RUNS}
        name = command.__name__.rstrip("_").replace("_", "-")
        app.command(name, rich_help_panel=panel, context_settings=settings)(command)
