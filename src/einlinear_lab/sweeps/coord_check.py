"""Coordinate check on real data: do the features of wide models change as much per step as those of narrow ones?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from einlinear.mup.coordinates import coord_check
from einlinear_lab.models.config import DENSE
from einlinear_lab.runs.data import TrainingProblem
from einlinear_lab.runs.execution import initialised
from einlinear_lab.runs.options import names
from einlinear_lab.runs.run import Run
from einlinear_lab.sweeps.compare import with_comparison_defaults
from einlinear_lab.training import Training

# Different batches, used in turn.
_BATCHES = 16
_OF_TRAINING = ("steps", "lr")
_WITHOUT_EFFECT = {"structure", "width", *names(Training), "validation_tokens"} - {*_OF_TRAINING}


def template(options: Mapping[str, Any]) -> Run:
    """Make a run from options, with the defaults of a comparison.

    Raises:
        ValueError: an option that is unknown, wrong or without effect on a coordinate check.
    """
    if refused := [name for name in options if name in _WITHOUT_EFFECT]:
        raise ValueError(
            f"{', '.join(refused)} cannot be set: a coordinate check varies structure, width and structure_aware, and "
            "trains in float32 on the CPU with AdamW at a constant learning rate; it evaluates nothing. Of training "
            f"only {' and '.join(_OF_TRAINING)} can be set"
        )
    run = Run.of(with_comparison_defaults(options))
    if run.training.steps < 2:
        steps = run.training.steps
        raise ValueError(f"steps must be at least 2, not {steps}: the first moves only the head, which starts at zero")
    return run


def check(template: Run, problem: TrainingProblem, structures: Sequence[str], widths: Sequence[int]) -> None:
    """Build every model on the meta device. Raises ValueError for an unknown structure, or one that does not fit."""
    with torch.device("meta"):
        for spec in structures:
            for width in widths:
                replace(template.model, structure=spec, width=width).build(problem.shape)


def cases(structures: Sequence[str]) -> list[tuple[str, bool]]:
    """Return (structure, structure-aware learning rates?) of all measurements; dense has no control."""
    return [(spec, aware) for spec in structures for aware in (True, False) if aware or spec != DENSE]


def measure(
    template: Run,
    problem: TrainingProblem,
    structures: Sequence[str],
    widths: Sequence[int],
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[tuple[str, bool, dict[int, float]]]:
    """Train the models of all `cases`, and measure the relative change of the last block's features in one step.

    Args:
        template: run whose structure and width are varied; of its training only steps and lr count.
        progress: called with (structure, width, step) after every step.

    Yields:
        The arguments of `einlinear_lab.report.coordinate_check.FeatureUpdates`: structure, whether learning rates were
        structure-aware, and width -> relative update.
    """
    steps = template.training.steps
    batches = [problem.task.batch(step) for step in range(min(steps, _BATCHES))]
    probe, _ = problem.task.batch(_BATCHES)
    base = template.model.base(problem.shape)
    for spec, structure_aware in cases(structures):

        def build(width: int, spec: str = spec) -> nn.Module:
            model = replace(template.model, structure=spec, width=width)
            return initialised(replace(template, model=model), problem)

        results = coord_check(
            build,
            widths,
            batches,
            probe,
            lr=template.training.lr,
            base=base,
            layers=base.last_block,
            steps=steps,
            loss=problem.task.loss,
            lr_scale=base.LR_SCALE,
            structure_aware=structure_aware,
            progress=progress and partial(progress, spec),
        )
        yield spec, structure_aware, {result.width: result.relative_update for result in results}
