"""What is on disk of a run: its options, its result, and reading them back. Files are whole or absent."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

import einlinear
from einlinear.experiments.runs.problems import Problem
from einlinear.experiments.runs.run import Run

FORMAT = 2  # of the files; raised when an older program could misread them
RUN, RESULT, METRICS = "run.json", "result.json", "metrics.jsonl"
# What decides how a run goes; changes elsewhere leave results comparable.
_DECISIVE = ("structures", "ops", "nn", "parametrize", "data", "training")


@dataclass(frozen=True)
class Result:
    """What a run came to. The losses are None where the loss became NaN or infinite: it diverged.

    Attributes:
        params: of the model, biases and norms included.
        macs: multiply-accumulates of a forward pass, for one input: an image, a token, a vector; as the model began.
        inputs: of a step.
        steps: that were made.
        compute: multiply-accumulates of all forward passes of the training.
        train_loss: mean over the last tenth of the steps, as the batches were trained on.
        measures: of the final model, by name.
        error: the one of the measures that runs on the same data are compared by, see `Problem.error`.
        step_seconds: median duration of a training step, without its data.
    """

    params: int
    macs: int
    inputs: int
    steps: int
    compute: int
    train_loss: float | None
    measures: dict[str, float] = field(default_factory=dict)
    error: float | None = None
    step_seconds: float | None = None

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
        digest, source: of its data.
        error: the name of the measure that `Result.error` is.
        made_with: versions and machine.
    """

    folder: Path
    run: Run
    result: Result | None
    code: str
    digest: str
    source: str
    error: str
    made_with: str


@cache
def code_version() -> str:
    """The version of einlinear, and a hash of those of its sources that decide how a run goes."""
    root = Path(einlinear.__file__).parent
    digest = hashlib.sha256()
    files = (file for name in _DECISIVE for file in (root / name).rglob("*") if file.suffix in (".py", ".cpp"))
    for file in sorted(files):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    return f"{einlinear.__version__}+{digest.hexdigest()[:8]}"


def write_run(folder: Path, run: Run, code: str, problem: Problem) -> None:
    """Note down what a run is, before it starts."""
    content = {
        "format": FORMAT,
        "code": code,
        "made_with": _made_with(),
        "source": problem.source,
        "digest": problem.digest,
        "error": problem.error,
        "options": run.options,
    }
    write_json(folder / RUN, content)


def write_result(folder: Path, result: Result) -> None:
    """Note down what it came to: the last file of a run."""
    write_json(folder / RESULT, dataclasses.asdict(result))


def read_record(folder: Path) -> Record:
    """A run that was started.

    Raises:
        ValueError: its files are damaged or of another format.
    """
    try:
        content = json.loads((folder / RUN).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"it has format {content['format']}, but this version reads {FORMAT}")
        run = Run.of(content["options"])
        result = None
        if (folder / RESULT).exists():
            result = Result(**json.loads((folder / RESULT).read_text(encoding="utf-8")))
        return Record(
            folder, run, result, **{name: content[name] for name in ("code", "digest", "source", "error", "made_with")}
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the run in {folder} cannot be read: {error}") from None


@contextmanager
def alone(path: Path, otherwise: str) -> Iterator[None]:
    """Hold a lock file, of which the system lets go when the process dies; BlockingIOError if another one holds it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(otherwise) from None
    try:
        yield
    finally:
        lock.release()


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is never seen half written."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """`write_text` of JSON; what JSON has no words for, such as NaN, is an error."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _made_with() -> str:
    versions = f"einlinear {einlinear.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    return f"{versions}, {platform.system()} {platform.machine()}"
