"""Coordinate check on real data: do the features of wide models change as much per step as those of narrow ones?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from einlinear.mup.coordinate_check import coord_check
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
    """Make a run from options, with the defaults of a comparison; raise ValueError for options without effect."""
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


def run_of(template: Run, spec: str, width: int) -> Run:
    """Return the run of a structure and a width."""
    return replace(template, model=replace(template.model, structure=spec, width=width))


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

    Of the template's training only steps and lr count. Yields structure, whether learning rates were structure-aware,
    and width -> relative update. Progress is called with (structure, width, step).
    """
    training, base = template.training, template.model.base(problem.shape)
    batches = [problem.task.batch(step) for step in range(min(training.steps, _BATCHES))]
    probe, _ = problem.task.batch(_BATCHES)
    options: dict[str, Any] = {"lr": training.lr, "steps": training.steps, "loss": problem.task.loss}
    options |= {"base": base, "layers": base.last_block, "lr_scale": base.LR_SCALE, "alpha": template.model.alpha}
    for spec, aware in cases(structures):

        def build(width: int, spec: str = spec) -> nn.Module:
            return initialised(run_of(template, spec, width), problem)

        watch = progress and partial(progress, spec)
        results = coord_check(build, widths, batches, probe, structure_aware=aware, progress=watch, **options)
        yield spec, aware, {result.width: result.relative_update for result in results}
