"""What the commands print: tables, progress bars, messages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

import einlinear
from einlinear import ops
from einlinear.ops.bmm.plan import plan as make_plan
from einlinear.structures import Structure
from einlinear.structures.mup import adam_multipliers, init_std

if TYPE_CHECKING:  # heavy: loaded only by the commands that train
    from einlinear.experiments.findings.updates import Updates
    from einlinear.experiments.runs.records import Result
    from einlinear.experiments.runs.run import Run


def note(message: str) -> None:
    """A line to the terminal, its markup characters as they are."""
    Console().print(Text(message), soft_wrap=True)


def error(message: str) -> None:
    """A message in red to stderr."""
    Console(stderr=True).print(Text(f"error: {message}", style="red"), soft_wrap=True)


def warning(message: str) -> None:
    """A message in yellow to stderr."""
    Console(stderr=True).print(Text(message, style="yellow"), soft_wrap=True)


def structure(s: Structure) -> None:
    """Everything about one structure."""
    dense = einlinear.structure("dense", s.in_features, s.out_features)
    console = _console()
    note(f"{s}\npattern  {s.pattern}")
    note(f"sizes    {', '.join(f'{axis}={size}' for axis, size in s.sizes)}\n")

    factors = _table("factor", "axes", "shape", "fan in", "fan out", "params", "MACs", "init std", "Adam lr")
    for factor, std, multiplier in zip(s.factors, init_std(s), adam_multipliers(s), strict=True):
        shape = "×".join(map(str, factor.shape))
        counts = (factor.fan_in, factor.fan_out, factor.params, factor.macs)
        factors.add_row(
            factor.name, " ".join(factor.axes), shape, *(f"{n:,}" for n in counts), f"{std:.4g}", f"{multiplier:.4g}×"
        )
    console.print(factors)
    note("Factors in order of contraction. Adam lr: of dense of the same size.\n")

    totals = _table("", "this", "dense", "ratio")
    for name in ("params", "macs", "rank"):
        own, full = getattr(s, name), getattr(dense, name)
        totals.add_row("MACs" if name == "macs" else name, f"{own:,}", f"{full:,}", f"{own / full:.4g}")
    for name, meaning in (("psi", "rank = n^psi"), ("nu", "MACs = n^(1+nu)"), ("omega", "params / MACs = n^-omega")):
        totals.add_row(f"{name}  ({meaning})", f"{getattr(s, name):.4g}", f"{getattr(dense, name):.4g}")
    console.print(totals)


def plan(s: Structure, tokens: int) -> None:
    """Which executor runs a structure on this CPU in float32, and the steps of the batched matmuls."""
    note(f"\nExecutor for {tokens:,} inputs of float32 on this CPU, and what the others would take:")
    note(str(ops.choose(s, tokens, torch.float32, torch.device("cpu"))))
    note("\nBatched matmuls, and the states between them, the slowest axis first:")
    for steps in make_plan(s):
        for step in steps:
            note(f"  {s.factors[step.index].name}  {step}")


@contextmanager
def steps(total: int) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar, and the function that advances it by a step of a structure at a width."""
    with progress() as bars:
        task = bars.add_task("", total=total, loss="")

        def advance(spec: str, width: int, _: int) -> None:
            bars.update(task, advance=1, description=f"{spec}, width {width}")

        yield advance


def updates(found: Sequence[Updates]) -> None:
    """The table of a coordinate check."""
    widths = list(found[0].by_width)
    table = _table("structure", "learning rates", *(f"width {width}" for width in widths), "largest / smallest")
    for update in found:
        rates = "its own" if update.structure_aware else "of dense"
        changes = (f"{x:.4g}" if math.isfinite(x) else "diverged" for x in update.by_width.values())
        ratio = update.largest_over_smallest
        table.add_row(update.structure, rates, *changes, "–" if ratio is None else f"{ratio:.2f}")
    _console().print(table)
    note("Change of the features after the last block in one step, over their size (root mean squares).")


def result(run: Run, found: Result) -> None:
    """What a single run came to."""
    table = _table("", run.name)
    table.add_row("parameters", f"{found.params:,}")
    table.add_row("MACs of an input", f"{found.macs:,}")
    table.add_row("train loss", "diverged" if found.train_loss is None else f"{found.train_loss:.4f}")
    for name, value in found.measures.items():
        table.add_row(name.replace("_", " "), f"{value:.4f}")
    if found.step_seconds:
        table.add_row("inputs a second", f"{found.inputs / found.step_seconds:,.0f}")
    _console().print(table)


def show(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table of texts, the first column to the left, the others to the right."""
    table = _table(*headings)
    for row in rows:
        table.add_row(*map(Text, row))
    _console().print(table)


def progress() -> Progress:
    """Progress bars, which only a terminal shows, and of several processes the first one."""
    from einlinear.training.distributed import is_first  # heavy

    console = Console()
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=44)),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    return Progress(*columns, console=console, transient=True, disable=not (console.is_terminal and is_first()))


def _console() -> Console:
    """Standard output; a pipe or file has no width to fit tables into."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, heading in enumerate(headings):
        justify: Literal["left", "right"] = "left" if i == 0 else "right"
        table.add_column(heading, justify=justify, overflow="fold", no_wrap=i > 0)
    return table
