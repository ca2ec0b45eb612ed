"""Files of a run: run.json with its options, result.json with its result. Writes are atomic."""

from __future__ import annotations

import dataclasses
import math
import platform
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from einlinear.checkpoint import check_same
from einlinear.files import read_json, write_json
from einlinear.version import __version__, code_digest
from einlinear_lab.runs.data_config import TrainingProblem
from einlinear_lab.runs.options import names, parse_strictly
from einlinear_lab.runs.run import Run

# Raised when the files change in a way that another version would misread.
FORMAT = 4
_RENAMED_IN_4 = {"digest": "data_digest", "source": "data_source", "error": "metric", "options": "config"}
RUN, RESULT, METRICS = "run.json", "result.json", "metrics.jsonl"
# Packages that determine results; changes elsewhere leave runs comparable.
_DECISIVE = (
    *(f"einlinear/{folder}" for folder in ("structures", "ops", "nn", "mup", "conversion")),
    *(f"einlinear_lab/{folder}" for folder in ("models", "data", "training", "runs")),
)


@dataclass(frozen=True)
class Result:
    """Result of a run. Losses are None if the run diverged: its loss became NaN or infinite.

    Attributes:
        params: parameters of the final model, biases and norms included.
        macs: multiply-accumulates of its forward pass for one input: an image, a token, a vector.
        inputs: inputs per step.
        steps: number of steps made.
        compute: multiply-accumulates of all forward passes of the training, those of guides included.
        train_loss: mean training loss of the last tenth of the steps.
        metrics: of the final model, by name.
        step_seconds: median duration of a training step, without data loading.
        memory: bytes, of the first process: see `einlinear_lab.training.Outcome`.
        guide_macs: multiply-accumulates of the guides for one input, see `TrainingConfig.guide_until`.
    """

    params: int
    macs: int
    inputs: int
    steps: int
    compute: int
    train_loss: float | None
    metrics: dict[str, float] = field(default_factory=dict)
    step_seconds: float | None = None
    memory: int | None = None
    guide_macs: int = 0

    @property
    def diverged(self) -> bool:
        return self.train_loss is None


@dataclass(frozen=True)
class _Origin:
    """Version of the code, pattern, digest and source of the data, metric by which runs are compared, and machine."""

    code: str
    pattern: str
    data_digest: str
    data_source: str
    metric: str
    made_with: str


_ORIGIN = names(_Origin)
_POSITIVE = ("macs", "inputs", "steps", "compute")


@dataclass(frozen=True)
class Record(_Origin):
    """A run on disk; the result is None while it is not finished."""

    folder: Path
    run: Run
    result: Result | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        """Values that identify the run."""
        return {**self.run.hyperparameters, "pattern": self.pattern, "data_digest": self.data_digest, "code": self.code}


def code_version() -> str:
    """Return the version of einlinear, and a digest of the sources that determine results."""
    return f"{__version__}+{code_digest(*_DECISIVE)}"


def describe(folder: Path, run: Run, problem: TrainingProblem) -> Record:
    """Return the record of a run that is about to start."""
    versions = f"einlinear {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    made_with = f"{versions}, {platform.system()} {platform.machine()}"
    origin = (code_version(), run.pattern, problem.data_digest, problem.data_source, problem.metric, made_with)
    return Record(*origin, folder=folder, run=run)


def write_run(record: Record) -> None:
    """Write run.json, before the run starts. Raises ValueError if the folder holds another run."""
    check_folder(record)
    origin = {name: getattr(record, name) for name in _ORIGIN}
    write_json(record.folder / RUN, {"format": FORMAT, **origin, "config": record.run.config})


def check_folder(record: Record) -> None:
    """Raise ValueError if the folder holds another run; a damaged run may be repeated."""
    try:
        existing, _ = _read_description(record.folder)
    except ValueError:
        return
    check_same(record.folder, existing.metadata, record.metadata)


def write_result(folder: Path, result: Result) -> None:
    """Write result.json, the last file of a run."""
    write_json(folder / RESULT, dataclasses.asdict(result))


def read_record(folder: Path) -> Record:
    """Read the files of a run that was started. Raises ValueError if they are damaged or of another format."""
    (record, written_format), path = _read_description(folder), folder / RESULT
    if not path.exists():
        return record
    try:
        content = read_json(path)
        if written_format == 3 and isinstance(content, dict):
            # a copy of the metric
            content.pop("error", None)
        result = parse_strictly(Result, content)
        for name, value in {**dataclasses.asdict(result), **result.metrics}.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} is not finite")
            if isinstance(value, int) and not (name in _POSITIVE) <= value < 2**63:
                raise ValueError(f"{name} is {value}")
        if not result.diverged and record.metric not in result.metrics:
            raise ValueError(f"it has no {record.metric}")
        return replace(record, result=result)
    except (OSError, ValueError) as error:
        raise ValueError(f"the run in {folder} cannot be read: {RESULT}: {error}") from None


def _read_description(folder: Path) -> tuple[Record, int]:
    """Read run.json, and the number of its format."""
    try:
        content = read_json(folder / RUN)
        written_format = content.get("format", FORMAT) if isinstance(content, dict) else FORMAT
        if written_format not in (3, FORMAT):
            raise ValueError(
                f"it has format {written_format} of another version of einlinear, and this version reads formats 3 and "
                f"{FORMAT}. Repeat the run in another folder, or use that version"
            )
        if written_format == 3:
            content = {_RENAMED_IN_4.get(name, name): value for name, value in content.items()}
        if not isinstance(content, dict) or content.keys() != {"format", "config", *_ORIGIN}:
            raise ValueError(f"it is not an object of format, config, {', '.join(_ORIGIN)}")
        for name, value in content["config"].items():
            if isinstance(value, int) and abs(value) >= 2**63:
                raise ValueError(f"{name} has {len(str(value))} digits")
        origin = parse_strictly(_Origin, {name: content[name] for name in _ORIGIN})
        return Record(folder=folder, run=Run.of(content["config"]), **vars(origin)), written_format
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the run in {folder} cannot be read: {RUN}: {error}") from None
