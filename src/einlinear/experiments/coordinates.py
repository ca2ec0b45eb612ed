"""The coordinate check on images: whether the features of wide models move as much as those of narrow ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
import torch
from torch import nn

from einlinear.data import Batches, Images, pixel_permutation
from einlinear.experiments.config import DENSE, Settings
from einlinear.experiments.plots import colour, nice_ticks, style, symbol
from einlinear.experiments.store import write_text
from einlinear.experiments.train import PERMUTATION_SEED, Run, base_model, build_model, initialised
from einlinear.parametrize.coord_check import coord_check

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


def check(images: Images, structures: Sequence[str], widths: Sequence[int], depth: int, steps: int) -> None:
    """Build every model without memory.

    Raises:
        ValueError: a structure that is unknown or does not fit a width, or too few steps.
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, not {steps}: the first moves only the head, which starts at zero")
    with torch.device("meta"):
        for spec in structures:
            for width in widths:
                build_model(images, spec, width, depth)


def cases(structures: Sequence[str]) -> list[tuple[str, bool]]:
    """What to measure: every structure with its own learning rates and, unless it is dense, with those of dense."""
    return [(spec, aware) for spec in structures for aware in (True, False) if aware or spec != DENSE]


def measure(
    images: Images,
    structures: Sequence[str],
    widths: Sequence[int],
    settings: Settings,
    steps: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[Updates]:
    """The updates of all `cases`.

    Args:
        images, settings: as for `train`.
        structures: specs.
        widths: to compare.
        steps: of training at each.
        progress: called with (structure, width, step) after every step.
    """
    order = pixel_permutation(images.features, PERMUTATION_SEED)
    batches = Batches(images, settings.batch_size, seed=0, permutation=order)
    data = [batches.batch(step) for step in range(min(steps, _BATCHES))]
    probe = images.test_x[: settings.batch_size].flatten(1)[:, order]
    base = base_model(images, settings)
    for spec, structure_aware in cases(structures):

        def build(width: int, spec: str = spec) -> nn.Module:
            return initialised(images, Run(spec, width, 0), settings.depth)

        def report(width: int, step: int, spec: str = spec) -> None:
            if progress:
                progress(spec, width, step)

        found = coord_check(
            build,
            widths,
            data,
            probe,
            lr=settings.lr,
            base=base,
            layers=base.last_block,
            steps=steps,
            lr_scale=base.LR_SCALE,
            structure_aware=structure_aware,
            progress=report,
        )
        yield Updates(spec, structure_aware, {measured.width: measured.relative_update for measured in found})


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
