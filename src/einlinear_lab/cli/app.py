"""The `einlinear` command. Each subcommand is imported when it is called.

`--version` and `--help` must not import torch, so the help of the subcommands is repeated here; a test compares it.
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING or (find_spec("typer") and find_spec("rich")):
    import typer
    from typer.core import TyperGroup
else:
    from einlinear_lab.cli.packages import CLI, require

    require(CLI)

PANELS = {
    "Layers": {
        "describe": "Show a structure's factors, parameters, MACs, rank and exponents at one size, next to dense.",
        "bench": "Measure speed and memory of structures and backends against nn.Linear, in interleaved rounds.",
    },
    "Training": {
        "prepare": "Turn text into tokens for language models, a share of them held out for validation.",
        "compare": "Train structures side by side at matched compute, print a table and write report.html.",
        "train": "Train one model.",
        "sweep": "Do all runs of a sweep file or a recipe, and report on them.",
        "search": "Search for the structure with the lowest loss at a budget of compute.",
        "recipes": "List the experiments from papers that `einlinear sweep` knows by name, and what each should show.",
        "coord-check": "Measure how much a training step moves the features at several widths, and write report.html.",
    },
    "Results": {
        "report": "Print a table of the models in results folders, and write a page about all their runs.",
        "map": "Map a search: the exponents of its structures against their loss.",
        "fit": "Fit scaling laws to results folders, for each structure: loss = floor + scale × compute^-exponent.",
    },
    "Pretrained models": {
        "compress": "Make a pretrained Hugging Face model smaller.",
    },
}
# Modules of several commands.
_MODULES = {"recipes": "sweep", "report": "results", "map": "results", "fit": "results"}
# Commands with options of runs, which check unknown options themselves.
_OF_RUNS = ("compare", "train", "sweep", "search", "coord-check")
# Bugs show a plain traceback.
_PLAIN: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False}


class _Commands(TyperGroup):
    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, load(name) if name else command, rest


def load(name: str) -> Any:
    """Import a command and return it as a click command, whose help is the docstring of its function."""
    module = name.replace("-", "_")
    function = getattr(import_module(f"einlinear_lab.cli.{_MODULES.get(name, module)}"), f"{module}_command")
    single = typer.Typer(**_PLAIN)
    single.command(name, context_settings={"ignore_unknown_options": name in _OF_RUNS})(function)
    command = typer.main.get_command(single)
    text, _, arguments = (inspect.getdoc(function) or "").partition("\n\nArgs:\n")
    command.help = text
    # Lines of further indentation continue the help of an argument.
    helps = dict(re.findall(r"^    (\w+): (.*(?:\n     .*)*)", arguments, re.MULTILINE))
    for parameter in command.params:
        if parameter.name in helps:
            parameter.help = " ".join(helps[parameter.name].split())  # type: ignore[attr-defined]
    return command


app = typer.Typer(
    cls=_Commands,
    help="Structured linear layers for PyTorch: train, compare, search and compress.\n\n"
    'Start with:  einlinear describe "btt(rank=2)" 1024 4096  or  einlinear compare --preset demo',
    no_args_is_help=True,
    **_PLAIN,
)
for panel, commands in PANELS.items():
    for name, first_line in commands.items():
        app.command(name, help=first_line, rich_help_panel=panel)(lambda: None)


def _version(is_set: bool) -> None:
    if is_set:
        print(f"einlinear {version('einlinear')}")
        raise typer.Exit


_Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")]
_IMPORT = "A module or .py file that registers your own families. Goes before the command; may be repeated."
_Imports = Annotated[list[str] | None, typer.Option("--import", metavar="MODULE_OR_FILE", help=_IMPORT)]


@app.callback()
def _main(version: _Version = False, imports: _Imports = None) -> None:
    from einlinear_lab.cli.display import user_errors
    from einlinear_lab.cli.importing import import_all

    with user_errors():
        import_all(imports or ())


def main() -> None:
    app()
