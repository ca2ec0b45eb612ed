"""What is on disk of a run: its options, its result, and reading them back. Files are whole or absent."""

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
from einlinear_lab.runs.data import TrainingProblem
from einlinear_lab.runs.options import names, parse_strictly
from einlinear_lab.runs.run import Run

FORMAT = 2  # of the files; raised when an older program could misread them
RUN, RESULT, METRICS = "run.json", "result.json", "metrics.jsonl"
# What decides how a run goes; changes elsewhere leave results comparable.
_DECISIVE = (
    *(f"einlinear/{folder}" for folder in ("structures", "ops", "nn", "mup", "conversion")),
    *(f"einlinear_lab/{folder}" for folder in ("models", "data", "training", "runs")),
)


@dataclass(frozen=True)
class Result:
    """What a run came to. The losses are None where the loss became NaN or infinite: it diverged.

    Attributes:
        params: of the final model, biases and norms included.
        macs: multiply-accumulates of a forward pass of it, for one input: an image, a token, a vector.
        inputs: of a step.
        steps: that were made.
        compute: multiply-accumulates of all forward passes of the training, those of guides included.
        train_loss: mean over the last tenth of the steps, as the batches were trained on.
        metrics: of the final model, by name.
        error: the metric by which runs on the same data are compared, see `TrainingProblem.error`.
        step_seconds: median duration of a training step, without its data.
        memory: bytes, of the first process: see `einlinear_lab.training.Outcome`.
        guide_macs: of the guides, for one input, as long as there were any: `Training.guide_until`.
    """

    params: int
    macs: int
    inputs: int
    steps: int
    compute: int
    train_loss: float | None
    metrics: dict[str, float] = field(default_factory=dict)
    error: float | None = None
    step_seconds: float | None = None
    memory: int | None = None
    guide_macs: int = 0

    @property
    def diverged(self) -> bool:
        return self.train_loss is None


@dataclass(frozen=True)
class Record:
    """A run on disk.

    Attributes:
        folder: of the run.
        run: its options.
        result: what it came to; None while it is not finished.
        code: of einlinear, that it was made with.
        pattern: what the name of its structure stood for.
        digest, source: of its data.
        error: the name of the metric that `Result.error` is.
        made_with: versions and machine.
    """

    folder: Path
    run: Run
    result: Result | None
    code: str
    pattern: str
    digest: str
    source: str
    error: str
    made_with: str

    @property
    def facts(self) -> dict[str, Any]:
        """What identifies it."""
        return {**self.run.identity, "pattern": self.pattern, "data_digest": self.digest, "code": self.code}


@dataclass(frozen=True)
class _Noted:
    """What a file says of a run beside its options."""

    code: str
    pattern: str
    digest: str
    source: str
    error: str
    made_with: str


_NOTED = names(_Noted)
_COUNTED = ("macs", "inputs", "steps", "compute")  # at least 1 of each


def code_version() -> str:
    """The version of einlinear, and a digest of those of its sources that decide how a run goes."""
    return f"{__version__}+{code_digest(*_DECISIVE)}"


def describe(folder: Path, run: Run, problem: TrainingProblem) -> Record:
    """A run that is about to start."""
    return Record(
        folder=folder,
        run=run,
        result=None,
        code=code_version(),
        pattern=run.pattern,
        digest=problem.digest,
        source=problem.source,
        error=problem.error,
        made_with=_made_with(),
    )


def write_run(record: Record) -> None:
    """Note down what a run is, before it starts.

    Raises:
        ValueError: its folder holds another run.
    """
    check_folder(record)
    noted = {name: getattr(record, name) for name in _NOTED}
    write_json(record.folder / RUN, {"format": FORMAT, **noted, "options": record.run.options})


def check_folder(record: Record) -> None:
    """Raise ValueError if the folder of a run holds another one; a damaged one may be done again."""
    try:
        before = _read_description(record.folder)
    except ValueError:  # there is none, or it is damaged
        return
    check_same(record.folder, before.facts, record.facts)


def write_result(folder: Path, result: Result) -> None:
    """Note down what it came to: the last file of a run."""
    write_json(folder / RESULT, dataclasses.asdict(result))


def read_record(folder: Path) -> Record:
    """A run that was started.

    Raises:
        ValueError: its files are damaged or of another format.
    """
    record, path = _read_description(folder), folder / RESULT
    if not path.exists():
        return record
    try:
        result = _check(parse_strictly(Result, read_json(path)))
        if not result.diverged and (result.error is None or record.error not in result.metrics):
            raise ValueError(f"it has no {record.error}")
        return replace(record, result=result)
    except (OSError, ValueError) as error:
        raise ValueError(f"the run in {folder} cannot be read: {RESULT}: {error}") from None


def _read_description(folder: Path) -> Record:
    """What run.json says."""
    try:
        content = read_json(folder / RUN)
        if not isinstance(content, dict) or content.keys() != {"format", "options", *_NOTED}:
            raise ValueError(f"it is not an object of format, options, {', '.join(_NOTED)}")
        if content["format"] != FORMAT:
            raise ValueError(f"it has format {content['format']}, but this version reads {FORMAT}")
        for name, value in content["options"].items():
            if isinstance(value, int) and abs(value) >= 2**63:
                raise ValueError(f"{name} has {len(str(value))} digits")
        noted = parse_strictly(_Noted, {name: content[name] for name in _NOTED})
        return Record(folder, Run.of(content["options"]), None, **dataclasses.asdict(noted))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the run in {folder} cannot be read: {RUN}: {error}") from None


def _check(result: Result) -> Result:
    """Raise ValueError if a result has a number that no run comes to."""
    for name, value in {**dataclasses.asdict(result), **result.metrics}.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is not finite")
        if isinstance(value, int) and not (name in _COUNTED) <= value < 2**63:
            raise ValueError(f"{name} is {value}")
    return result


def _made_with() -> str:
    versions = f"einlinear {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    return f"{versions}, {platform.system()} {platform.machine()}"
