"""Execution of a run in its folder, with a lock: an interrupted run resumes.

FOLDER/run.json       options, code version and data
FOLDER/metrics.jsonl  metrics by step, see einlinear_lab.training.metrics
FOLDER/checkpoints/   checkpoints to resume from
FOLDER/result.json    result of a finished run
"""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from einlinear.files import lock
from einlinear.mup import init_
from einlinear_lab.models import ReferenceModel
from einlinear_lab.models.macs import params
from einlinear_lab.runs.data_config import DataConfig, TrainingProblem
from einlinear_lab.runs.records import Result, describe, write_result, write_run
from einlinear_lab.runs.run import Run
from einlinear_lab.training.distributed import is_first
from einlinear_lab.training.guided import guide, unguide
from einlinear_lab.training.loop import Progress, Steps, finish, train_in_steps

# Share of the steps whose mean loss is the training loss of a run.
LAST = 0.1


def execute(
    run: Run, folder: Path | None = None, progress: Progress | None = None, *, keep_checkpoints: bool = False
) -> Result:
    """Train the model of a run. Losses are reproducible on a CPU with the same number of threads.

    Args:
        run: config of the run.
        folder: for the files of the run, from which it resumes. None writes no files.
        progress: called after every step.
        keep_checkpoints: whether to keep the checkpoints of the finished run.

    Raises:
        ValueError, OSError: the run, its data or its folder is invalid, or another process is at work in the folder.
    """
    return finish(execute_in_steps(run, folder, keep_checkpoints=keep_checkpoints), progress)


def execute_in_steps(run: Run, folder: Path | None = None, *, keep_checkpoints: bool = False) -> Steps[Result]:
    """Train the model of a run as `execute` does, a step at a time, so that several runs can take turns."""
    # Under torchrun only the first process writes files.
    if folder is None or not is_first():
        return (yield from _train(run, folder))
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock", f"another process is at work in {folder}"):
        result = yield from _train(run, folder)
        write_result(folder, result)
    if not keep_checkpoints:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result


def initialised(run: Run, problem: TrainingProblem) -> ReferenceModel:
    """Return the initialised model of a run."""
    torch.manual_seed(run.seed)
    model = run.model.build(problem.shape)
    init_(model, zero=model.ZERO)
    return model


def check_runs(runs: Iterable[Run]) -> dict[DataConfig, str]:
    """Load all data and build all models on the meta device, so that errors come early; return the data's digests."""
    problems: dict[DataConfig, TrainingProblem] = {}
    for run in runs:
        if run.data not in problems:
            problems[run.data] = run.data.load(run.seed)
        with torch.device("meta"):
            run.model.build(problems[run.data].shape)
    return {data: problem.data_digest for data, problem in problems.items()}


def _train(run: Run, folder: Path | None) -> Steps[Result]:
    problem = run.data.load(run.seed)
    record = describe(folder or Path(), run, problem)
    model, base = initialised(run, problem), run.model.base(problem.shape)
    macs = model.macs
    guide_macs = 0 if run.training.guide_until is None else _guide_macs(model)
    if folder is not None and is_first():
        write_run(record)
    options: dict[str, Any] = {"lr_scale": model.LR_SCALE, "alpha": run.model.alpha, "metadata": record.metadata}
    outcome = yield from train_in_steps(model, base, problem.task, run.training, folder, **options)
    steps = len(outcome.losses)
    structured = min(run.training.densify_at or steps, steps)
    guided = min(run.training.guide_until or 0, steps)
    last = max(1, round(LAST * steps))
    finished = not outcome.diverged
    return Result(
        params=params(model),
        macs=model.macs,
        inputs=problem.inputs,
        steps=steps,
        compute=problem.inputs * (macs * structured + model.macs * (steps - structured) + guide_macs * guided),
        train_loss=statistics.fmean(outcome.losses[-last:]) if finished else None,
        metrics=dict(outcome.metrics) if finished else {},
        step_seconds=None if math.isnan(outcome.step_seconds) else outcome.step_seconds,
        memory=outcome.memory,
        guide_macs=guide_macs,
    )


def _guide_macs(model: ReferenceModel) -> int:
    without = model.macs
    guide(model)
    added = model.macs - without
    unguide(model)
    return added
