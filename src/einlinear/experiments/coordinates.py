"""The coordinate check on real data: whether the features of wide models move as much as those of narrow ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import plotly.graph_objects as go
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from einlinear.experiments.execute import initialised
from einlinear.experiments.models import DENSE
from einlinear.experiments.plots import colour, nice_ticks, style, symbol
from einlinear.experiments.problems import Problem
from einlinear.experiments.records import write_json, write_text
from einlinear.experiments.run import Run
from einlinear.parametrize.coord_check import coord_check

FILE = "coord-check.json"
_BATCHES = 16  # different ones, used in turn


@dataclass(frozen=True)
class Updates:
    """How much one step changes the features after the last block, by width.

    Attributes:
        structure: its spec.
        structure_aware: whether every factor had its own learning rate, or (the control) that of a dense layer.
        by_width: width -> root mean square of the change over that of the features, means over the steps; NaN or
            infinite where the run diverged.
    """

    structure: str
    structure_aware: bool
    by_width: dict[int, float]

    @property
    def largest_over_smallest(self) -> float | None:
        """Near 1 where learning rates carry over; None where a run diverged or its features did not move at all."""
        values = self.by_width.values()
        return max(values) / min(values) if all(map(_measured, values)) else None


def _measured(value: float) -> bool:
    return 0 < value < math.inf


def check(template: Run, problem: Problem, structures: Sequence[str], widths: Sequence[int]) -> None:
    """Build every model without memory.

    Raises:
        ValueError: a structure that is unknown or does not fit a width, or too few steps.
    """
    if template.training.steps < 2:
        raise ValueError(
            f"steps must be at least 2, not {template.training.steps}: the first moves only the head, which starts at "
            "zero"
        )
    with torch.device("meta"):
        for spec in structures:
            for width in widths:
                replace(template.model, structure=spec, width=width).build(problem.shape)


def cases(structures: Sequence[str]) -> list[tuple[str, bool]]:
    """What to measure: every structure with its own learning rates and, unless it is dense, with those of dense."""
    return [(spec, aware) for spec in structures for aware in (True, False) if aware or spec != DENSE]


def measure(
    template: Run,
    problem: Problem,
    structures: Sequence[str],
    widths: Sequence[int],
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[Updates]:
    """The updates of all `cases`.

    Args:
        template: a run, of which structure and width are varied; of its training count steps and lr.
        problem: its data.
        structures: specs.
        widths: to compare.
        progress: called with (structure, width, step) after every step.
    """
    steps = template.training.steps
    batches = [problem.task.batch(step) for step in range(min(steps, _BATCHES))]
    probe, _ = problem.task.batch(_BATCHES)
    base = template.model.base(problem.shape)
    for spec, structure_aware in cases(structures):

        def build(width: int, spec: str = spec) -> nn.Module:
            model = replace(template.model, structure=spec, width=width)
            return initialised(replace(template, model=model), problem)

        def report(width: int, step: int, spec: str = spec) -> None:
            if progress:
                progress(spec, width, step)

        found = coord_check(
            build,
            widths,
            batches,
            probe,
            lr=template.training.lr,
            base=base,
            layers=base.last_block,
            steps=steps,
            loss=_loss,
            lr_scale=base.LR_SCALE,
            structure_aware=structure_aware,
            progress=report,
        )
        yield Updates(spec, structure_aware, {measured.width: measured.relative_update for measured in found})


def write_updates(updates: Sequence[Updates], folder: Path) -> None:
    """Keep them in a results folder, for its report; where a run diverged, null stands."""
    content = [
        {
            "structure": update.structure,
            "structure_aware": update.structure_aware,
            "by_width": {str(w): value if _measured(value) else None for w, value in update.by_width.items()},
        }
        for update in updates
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, content)


def _loss(outputs: Tensor, targets: Tensor) -> Tensor:
    if targets.is_floating_point():
        return F.mse_loss(outputs, targets)
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def write_page(updates: Sequence[Updates], path: Path) -> None:
    """A page with the figure; it loads nothing from the network."""
    figure = go.Figure()
    names = list(dict.fromkeys(update.structure for update in updates))
    for update in updates:
        i = names.index(update.structure)
        figure.add_trace(
            go.Scatter(
                x=list(update.by_width),
                y=[value if _measured(value) else None for value in update.by_width.values()],
                name=update.structure if update.structure_aware else f"{update.structure}, dense learning rates",
                mode="lines+markers",
                marker={"color": colour(i), "symbol": symbol(i), "size": 9},
                line={"color": colour(i), "dash": "solid" if update.structure_aware else "dot"},
            )
        )
    style(figure)
    widths = sorted({width for update in updates for width in update.by_width})
    values = [value for update in updates for value in update.by_width.values() if _measured(value)]
    ticks = nice_ticks(min(values, default=0.1), max(values, default=1.0))
    figure.update_xaxes(title="width", type="log", tickvals=widths, ticktext=[str(width) for width in widths])
    figure.update_yaxes(title="relative change of features in a step", type="log", tickvals=ticks)
    figure.update_layout(
        title="Coordinate check: a level line means that the learning rate carries over",
        legend={"orientation": "h", "y": -0.25, "yanchor": "top"},
        margin={"t": 60, "b": 140},
    )
    write_text(path, figure.to_html(include_plotlyjs=True, config={"responsive": True, "displaylogo": False}))
