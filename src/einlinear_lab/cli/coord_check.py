"""The command `einlinear coord-check`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from einlinear_lab.cli import display
from einlinear_lab.cli.packages import LAB, require
from einlinear_lab.cli.parsing import assignments, numbers, specs
from einlinear_lab.cli.running import command_line

_STRUCTURES = ["dense; low_rank; kronecker; monarch; btt"]


def coord_check_command(
    config: Annotated[list[str] | None, typer.Argument(metavar="NAME=VALUE")] = None,
    structures: list[str] = _STRUCTURES,
    widths: str = "64,256,1024",
    steps: int = 100,
    seeds: Annotated[int, typer.Option(min=1)] = 1,
    data: str = "auto",
    out: Path = Path("results/coord-check"),
) -> None:
    """Measure how much a training step moves the features at several widths, and write report.html.

    With structure-aware learning rates the change should be about the same at every width. As a control, every
    structure is also trained with the learning rates of dense layers.

    Args:
        config: lr, optimizer, and options of the model and the data, as for train: lr=1e-3, depth=3, ...
        structures: As for compare.
        widths: Widths to compare, separated by ','.
        steps: Training steps at each width, at least 2.
        seeds: Initialisations of every model, over which the changes are averaged.
        data: As for compare.
        out: Results folder.
    """
    require(LAB)
    from einlinear_lab.coordinate_check import cases, measure, run_of, template, write_updates
    from einlinear_lab.report import write_report
    from einlinear_lab.runs.execution import check_runs

    with display.user_errors():
        chosen = specs(structures) or ()
        sizes = numbers(widths, "--widths") or ()
        run = template({"data": data, "steps": steps, **assignments(config)})
        check_runs(run_of(run, spec, width) for spec in chosen for width in sizes)
        problem = run.data.load(run.seed)
        out.mkdir(parents=True, exist_ok=True)
    total = len(cases(chosen)) * len(sizes) * run.training.steps * seeds
    with display.interruptible("Interrupted."), display.progress() as bars:
        bar = bars.add_task("", total=total)

        def advance(spec: str, width: int, _: int) -> None:
            bars.update(bar, advance=1, description=f"{spec}, width {width}")

        updates = list(measure(run, problem, chosen, sizes, advance, seeds))
    rows = []
    for update in updates:
        rates = "its own" if update.structure_aware else "of dense"
        changes = (f"{x:.4g}" if math.isfinite(x) else "diverged" for x in update.by_width.values())
        ratio = update.max_over_min
        rows.append((update.structure, rates, *changes, "–" if ratio is None else f"{ratio:.2f}"))
    columns = (f"width {width}" for width in updates[0].by_width)
    display.show(("structure", "learning rates", *columns, "largest / smallest"), rows)
    display.note("Change of the features after the last block in one step, over their size (root mean squares).")
    write_updates(out, updates, command_line(), problem.data_source)
    display.note(f"Report: {write_report([out]).path}")
