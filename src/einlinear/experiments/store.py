"""A results folder: experiment.json says what all runs in it share, runs/ holds one file per finished run.

Files are written beside their place and then moved there, so each of them is whole or absent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import einlinear
from einlinear.experiments.train import Result, Run

FORMAT = 1  # of the files; raised when an older program could misread them
_EXPERIMENT = "experiment.json"


@dataclass(frozen=True)
class Experiment:
    """What experiment.json says.

    Attributes:
        shared: settings and data that every run in the folder has in common, flat, as JSON values.
        source: one sentence on where the data came from.
        structures: in the order in which they are shown.
        commands: the command lines that added to the folder.
        made_with: versions and machine of the latest of them.
    """

    shared: dict[str, Any]
    source: str
    structures: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    made_with: str = ""


class Store:
    """The results of one experiment, on disk.

    Args:
        folder: created if it is absent.
        experiment: what its runs share. A folder of the same experiment is continued: structures and commands that are
            new to it are added to its own.

    Raises:
        ValueError: the folder holds something else: another experiment's results (the message names what differs),
            those of another version, or files of the user's.
    """

    def __init__(self, folder: str | Path, experiment: Experiment) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; name a folder for the results")
        if (self.folder / _EXPERIMENT).exists():
            before = read_experiment(self.folder)
            _check_same(self.folder, before.shared, experiment.shared)
            experiment = dataclasses.replace(
                experiment,
                structures=tuple(dict.fromkeys(before.structures + experiment.structures)),
                commands=tuple(dict.fromkeys(before.commands + experiment.commands)),
            )
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} holds files that are no results of einlinear; name another folder")
        self.experiment = experiment
        (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        versions = {"format": FORMAT, "einlinear": einlinear.__version__}
        _write(self.folder / _EXPERIMENT, versions | dataclasses.asdict(experiment))

    def path(self, run: Run) -> Path:
        """The file of a run."""
        words = re.sub(r"[^a-z0-9]+", "-", run.structure.lower()).strip("-")[:40]
        digest = hashlib.sha256(json.dumps(dataclasses.astuple(run)).encode()).hexdigest()[:8]
        return self.folder / "runs" / f"{words}-w{run.width}-s{run.seed}-{digest}.json"

    def add(self, result: Result) -> None:
        """Keep a finished run."""
        _write(self.path(result.run), dataclasses.asdict(result))

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Those of the runs that have no readable file yet."""
        finished = {result.run for result in read_results(self.folder)[0]}
        return [run for run in runs if run not in finished]

    def damaged(self) -> list[Path]:
        """Files of runs that cannot be read."""
        return read_results(self.folder)[1]


def read_experiment(folder: Path) -> Experiment:
    """What a results folder is about. Raises ValueError where it is none, or another version's."""
    path = folder / _EXPERIMENT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        written = content.pop("format"), content.pop("einlinear")
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no results of einlinear ({path} is missing)") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); name another folder, or remove this one") from None
    here = FORMAT, einlinear.__version__
    if written != here:
        raise ValueError(
            f"{folder} was written by einlinear {written[1]} (format {written[0]}), but this is {here[1]} (format "
            f"{here[0]}), whose runs may not be comparable. Name another folder, or go on with that version"
        )
    try:
        content["structures"], content["commands"] = tuple(content["structures"]), tuple(content["commands"])
        return Experiment(**content)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); name another folder, or remove this one") from None


def read_results(folder: Path) -> tuple[list[Result], list[Path]]:
    """The finished runs of a folder, sorted, and the files that are truncated or damaged."""
    results, damaged = [], []
    for path in sorted((folder / "runs").glob("*.json")):
        try:
            results.append(Result(**json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError):
            damaged.append(path)
    return sorted(results, key=lambda result: result.run), damaged


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is never seen half written."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _write(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _check_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    differences = [
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    if differences:
        raise ValueError(
            f"{folder} holds results of other settings: {'; '.join(differences)}. "
            "Name another folder (--out), or repeat the settings to add to this one"
        )
