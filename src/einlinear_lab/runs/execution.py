"""One run in its folder: trained, interrupted and continued, and never by two processes at a time.

FOLDER/run.json       its options, and the code and data it was started with
FOLDER/metrics.jsonl  what happened, see einlinear_lab.training.metrics
FOLDER/checkpoints/   where it goes on after an interruption
FOLDER/result.json    what it came to; where this file is, the run is finished
"""

from __future__ import annotations

import math
import shutil
import statistics
from pathlib import Path

import torch

from einlinear.files import lock
from einlinear.mup import init_
from einlinear_lab import training
from einlinear_lab.models import ReferenceModel
from einlinear_lab.models import macs as counts
from einlinear_lab.runs.data import TrainingProblem
from einlinear_lab.runs.records import Result, describe, write_result, write_run
from einlinear_lab.runs.run import Run
from einlinear_lab.training.distributed import is_first
from einlinear_lab.training.guided import guide, unguide
from einlinear_lab.training.loop import Outcome, Progress

LAST = 0.1  # share of the steps whose mean loss is the training loss of a run


def execute(
    run: Run, folder: Path | None = None, progress: Progress | None = None, *, keep_checkpoints: bool = False
) -> Result:
    """Train the model of a run; on a CPU with as many threads, the same run gives the same losses.

    Args:
        run: what to train.
        folder: where the run is kept, and from where it goes on. None keeps nothing.
        progress: called after every step.
        keep_checkpoints: the last ones, also when the run is finished.

    Raises:
        ValueError, OSError: whatever is wrong with the run, its data or its folder.
        BlockingIOError: another process is at work in the folder.
    """
    if folder is None:
        return _train(run, None, progress)
    if not is_first():  # the first one keeps the files
        return _train(run, folder, progress)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock", f"another process is at work in {folder}"):
        result = _train(run, folder, progress)
        write_result(folder, result)
    if not keep_checkpoints:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result


def initialised(run: Run, problem: TrainingProblem) -> ReferenceModel:
    """The model of a run as it starts."""
    torch.manual_seed(run.seed)
    model = run.model.build(problem.shape)
    init_(model, zero=model.ZERO)
    return model


def _train(run: Run, folder: Path | None, progress: Progress | None) -> Result:
    problem = run.data.load(run.seed)
    record = describe(folder or Path(), run, problem)
    model = initialised(run, problem)
    macs = model.macs
    guide_macs = 0 if run.training.guide_until is None else _guide_macs(model)
    if folder is not None and is_first():
        write_run(record)
    outcome = training.train(
        model,
        run.model.base(problem.shape),
        problem.task,
        run.training,
        folder,
        lr_scale=model.LR_SCALE,
        facts=record.facts,
        progress=progress,
    )
    steps = len(outcome.losses)
    before = min(run.training.densify_at or steps, steps)
    guided = min(run.training.guide_until or 0, steps)
    compute = problem.inputs * (macs * before + model.macs * (steps - before) + guide_macs * guided)
    return _result(outcome, problem, model, compute, guide_macs)


def _guide_macs(model: ReferenceModel) -> int:
    """What guides add to the MACs of an input."""
    before = model.macs
    guide(model)
    added = model.macs - before
    unguide(model)
    return added


def _result(outcome: Outcome, problem: TrainingProblem, model: ReferenceModel, compute: int, guide_macs: int) -> Result:
    last = max(1, round(LAST * len(outcome.losses)))
    finished = not outcome.diverged
    return Result(
        params=counts.params(model),
        macs=model.macs,
        inputs=problem.inputs,
        steps=len(outcome.losses),
        compute=compute,
        train_loss=statistics.fmean(outcome.losses[-last:]) if finished else None,
        metrics=dict(outcome.metrics) if finished else {},
        error=outcome.metrics[problem.error] if finished else None,
        step_seconds=None if math.isnan(outcome.step_seconds) else outcome.step_seconds,
        memory=outcome.memory,
        guide_macs=guide_macs,
    )
