"""Coordinate check on real data: do the features of wide models change as much per step as those of narrow ones?

FOLDER/coord-check.json   {"format": 1, "command": ..., "source": ..., "updates": [
                              {"structure": ..., "structure_aware": ..., "by_width": {"64": 0.1, "256": null}}, ...]}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from einlinear.files import read_json, write_json
from einlinear.mup.coordinate_check import coord_check
from einlinear_lab.models.config import DENSE
from einlinear_lab.runs.data_config import TrainingProblem
from einlinear_lab.runs.execution import initialised
from einlinear_lab.runs.options import names
from einlinear_lab.runs.run import Run
from einlinear_lab.sweeps.compare import with_comparison_defaults
from einlinear_lab.training import TrainingConfig

FILE = "coord-check.json"
_FORMAT = 1
# Different batches, used in turn.
_BATCHES = 16
_OF_TRAINING = ("steps", "lr", "optimizer", "product")
_WITHOUT_EFFECT = {"structure", "width", *names(TrainingConfig), "validation_tokens"} - {*_OF_TRAINING}


@dataclass(frozen=True)
class FeatureUpdates:
    """The relative change of the features after the last block in one step."""

    structure: str
    # whether every factor had its own learning rate; the naive control has that of a dense layer
    structure_aware: bool
    # root mean square of the change over that of the features, mean over the steps; NaN or infinite for divergence
    by_width: dict[int, float]

    @property
    def name(self) -> str:
        return self.structure if self.structure_aware else f"{self.structure}, naive"

    @property
    def max_over_min(self) -> float | None:
        """The largest update over the smallest: near 1 where learning rates transfer, None where a run diverged."""
        values = self.by_width.values()
        return max(values) / min(values) if all(map(is_update, values)) else None


@dataclass(frozen=True)
class CoordinateCheck:
    """The updates of several structures, the command that measured them, and the data in a sentence."""

    updates: tuple[FeatureUpdates, ...]
    command: str
    source: str


def write_updates(folder: Path, updates: Sequence[FeatureUpdates], command: str, source: str) -> Path:
    """Write the file of a results folder; NaN and infinities become null."""
    folder.mkdir(parents=True, exist_ok=True)
    path, content = folder / FILE, []
    for update in updates:
        by_width = {width: value if math.isfinite(value) else None for width, value in update.by_width.items()}
        content.append({**vars(update), "by_width": by_width})
    write_json(path, {"format": _FORMAT, "command": command, "source": source, "updates": content})
    return path


def read_updates(folder: Path) -> CoordinateCheck | None:
    """Read the file of a results folder; None without a file. Raises ValueError for a damaged file."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        content = read_json(path)
        if content["format"] != _FORMAT:
            raise ValueError(f"it has format {content['format']}, but this version reads {_FORMAT}")
        updates = []
        for update in content["updates"]:
            by_width = {int(width): math.nan if v is None else float(v) for width, v in update["by_width"].items()}
            updates.append(FeatureUpdates(str(update["structure"]), bool(update["structure_aware"]), by_width))
        return CoordinateCheck(tuple(updates), str(content["command"]), str(content["source"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the coordinate check in {path} cannot be read: {error}") from None


def template(options: Mapping[str, Any]) -> Run:
    """Make a run from options, with the defaults of a comparison; raise ValueError for options without effect."""
    if refused := [name for name in options if name in _WITHOUT_EFFECT]:
        raise ValueError(
            f"{', '.join(refused)} cannot be set: a coordinate check varies structure, width and structure_aware, and "
            "trains in float32 on the CPU at a constant learning rate; it evaluates nothing. Of training only "
            f"{', '.join(_OF_TRAINING)} can be set"
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
    seeds: int = 1,
) -> Iterator[FeatureUpdates]:
    """Train the models of all `cases`, and measure the relative change of the last block's features in one step.

    Of the template's training only steps, lr, optimizer and product count. The changes are means over `seeds`
    initialisations, from the template's seed on. Progress is called with (structure, width, step).
    """
    training, base = template.training, template.model.base(problem.shape)
    batches = [problem.task.batch(step) for step in range(min(training.steps, _BATCHES))]
    probe, _ = problem.task.batch(_BATCHES)
    options: dict[str, Any] = {name: getattr(training, name) for name in _OF_TRAINING} | {"loss": problem.task.loss}
    options |= {"base": base, "layers": base.last_block, "lr_scale": base.LR_SCALE, "alpha": template.model.alpha}
    for spec, aware in cases(structures):
        watch = progress and partial(progress, spec)
        by_width = dict.fromkeys(widths, 0.0)
        for seed in range(template.seed, template.seed + seeds):

            def build(width: int, spec: str = spec, seed: int = seed) -> nn.Module:
                return initialised(replace(run_of(template, spec, width), seed=seed), problem)

            for result in coord_check(build, widths, batches, probe, structure_aware=aware, progress=watch, **options):
                by_width[result.width] += result.relative_update / seeds
        yield FeatureUpdates(spec, aware, by_width)


def is_update(value: float) -> bool:
    """Return whether a value is positive and finite: divergence gives NaN or infinity, frozen features give zero."""
    return 0 < value < math.inf
