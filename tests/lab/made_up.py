"""Results that nobody trained for: runs whose losses are made up, in folders as real runs leave them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from einlinear_lab.models.config import Shape
from einlinear_lab.runs.data_config import TrainingProblem
from einlinear_lab.runs.records import METRICS, Record, Result, describe, read_record, write_result, write_run
from einlinear_lab.runs.run import Run
from einlinear_lab.runs.store import HISTORY, Store

COMMAND = "einlinear compare --lr 0.01 '<made up>'"


def run_of(structure: str = "dense", width: int = 32, seed: int = 0, **options: Any) -> Run:
    given = {"data": "digits", "steps": 100, "depth": 1, "structure": structure, "width": width, "seed": seed}
    return Run.of(given | options)


def write(
    folder: Path,
    run: Run,
    macs: int,
    train_loss: float | None,
    error: float | None = None,
    *,
    finished: bool = True,
    code: str = "v1",
    source: str = "Made up <b>here</b>",
    digest: str = "0",
    lines: list[dict[str, Any]] | None = None,
) -> Record:
    """A run of a results folder. Without a loss it diverged; its error is half its loss if not given."""
    store = Store(folder)
    path = store.path(run)
    path.mkdir(parents=True)
    names = {"images": "train_error", "teacher": "test_loss"}
    name = names.get(run.data.KIND, "validation_loss")
    problem = TrainingProblem(None, Shape(64, 10), run.data.batch_size, name, source, digest)  # type: ignore[arg-type]
    write_run(replace(describe(path, run, problem), code=code))
    if finished:
        error = train_loss / 2 if error is None and train_loss is not None else error
        good = train_loss is not None
        measures = {name: error, "test_accuracy": 1 - error} if good and error is not None else {}
        steps, inputs = run.training.steps, problem.inputs
        result = Result(
            macs + 123, macs, inputs, steps, macs * inputs * steps, train_loss, measures, 0.00456, 7_890_000
        )
        write_result(path, result)
    if lines:
        (path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / HISTORY).write_text(json.dumps({"command": COMMAND}) + "\n")
    return read_record(path)
