"""`einlinear coord-check`: its options, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from einlinear.cli import display
from einlinear.cli.endings import interruptible, user_errors
from einlinear.cli.packages import EXPERIMENTS, require
from einlinear.cli.parsing import assignments, numbers, specs
from einlinear.cli.running import command_line


def coord_check(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=VALUE]...", help="lr, and options of the model and the data, as for train: depth=3, ..."
        ),
    ] = None,
    structures: Annotated[
        list[str] | None, typer.Option(help="As for compare. Default: dense; low_rank; kronecker; monarch; btt.")
    ] = None,
    widths: Annotated[str, typer.Option(help="Widths to compare.")] = "64,256,1024",
    steps: Annotated[int, typer.Option(help="Training steps at each width, at least 2.")] = 100,
    data: Annotated[str, typer.Option(help="As for compare.")] = "auto",
    out: Annotated[Path, typer.Option(help="Results folder.")] = Path("results/coord-check"),
) -> None:
    """Measure how much a training step moves the features at several widths, and write report.html.

    With structure-aware learning rates the change should be about the same at every width; as a control, every
    structure is also trained with those of dense.
    """
    require(EXPERIMENTS)
    from einlinear.experiments.findings.coord_check import Updates, write_updates
    from einlinear.experiments.report import write_report
    from einlinear.experiments.sweeps.coord_check import cases, check, measure, template

    with user_errors():
        chosen = specs(structures) or ("dense", "low_rank", "kronecker", "monarch", "btt")
        sizes = numbers(widths, "--widths") or ()
        run = template({"data": data, "steps": steps, **assignments(settings)})
        problem = run.data.load(run.seed)
        check(run, problem, chosen, sizes)
        out.mkdir(parents=True, exist_ok=True)
    total = len(cases(chosen)) * len(sizes) * run.training.steps
    with interruptible("Interrupted."), display.steps(total) as step:
        updates = [Updates(*found) for found in measure(run, problem, chosen, sizes, step)]
    display.updates(updates)
    write_updates(out, updates, command_line(), problem.source)
    display.note(f"Report: {write_report([out]).path}")
