"""The coordinate check on real data: whether the features of wide models move as much as those of narrow ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from einlinear.experiments.findings.updates import Updates
from einlinear.experiments.runs.execute import initialised
from einlinear.experiments.runs.models import DENSE
from einlinear.experiments.runs.problems import Problem
from einlinear.experiments.runs.run import Run
from einlinear.parametrize.coord_check import coord_check

_BATCHES = 16  # different ones, used in turn


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


def _loss(outputs: Tensor, targets: Tensor) -> Tensor:
    if targets.is_floating_point():
        return F.mse_loss(outputs, targets)
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())
