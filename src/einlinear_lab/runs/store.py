"""A results folder: runs, each in a folder of its own, that differ only in what their experiment varies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from einlinear.files import lock, parse_json, write_text
from einlinear_lab.runs.data import Data
from einlinear_lab.runs.passwords import command_without_passwords
from einlinear_lab.runs.records import METRICS, RUN, Record, code_version, read_record
from einlinear_lab.runs.run import Run
from einlinear_lab.training import metrics

RUNS, HISTORY = "runs", "history.jsonl"


@dataclass(frozen=True)
class Store:
    """The runs of one experiment, on disk.

    FOLDER/runs/NAME/      a folder per run, see execute.py
    FOLDER/history.jsonl   the commands that added to it
    FOLDER/runs.sqlite     the table of all runs, see table.py: made from the other files, at any time
    """

    folder: Path

    def path(self, run: Run) -> Path:
        """The folder of a run."""
        return self.folder / RUNS / run.name

    def records(self) -> list[Record]:
        """All runs that were started, those whose files are damaged left out."""
        return [found for found in self._read() if isinstance(found, Record)]

    def damaged(self) -> list[str]:
        """What is wrong with the others."""
        return [str(found) for found in self._read() if isinstance(found, ValueError)]

    def damaged_lines(self) -> list[str]:
        """What is wrong with lines of the metrics of the runs: file, line and reason. They are left out."""
        return [text for record in self.records() for text in metrics.damaged(record.folder / METRICS)]

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Those of the runs that are not finished."""
        finished = {record.run.key for record in self.records() if record.result}
        return [run for run in runs if run.key not in finished]

    def open(
        self,
        runs: Collection[Run],
        axes: Collection[str],
        command: str = "",
        mix_code: bool = False,
        digests: Mapping[Data, str] | None = None,
    ) -> None:
        """Make the folder ready for more runs.

        Args:
            runs: to be added.
            axes: the options in which they may differ from those that are there, and from each other.
            command: that adds them, for the record.
            mix_code: take finished runs that another version of the code made; those that it has begun start anew.
            digests: of the data: what is behind a name may have changed.

        Raises:
            ValueError: the folder holds other files, or runs of another config, other data or another code: it says
                which.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; name a folder for the results")
        if self.folder.exists() and any(self.folder.iterdir()) and not (self.folder / RUNS).is_dir():
            raise ValueError(f"{self.folder} holds files that are no results of einlinear; name another folder")
        found = self.records()
        self._check_config(found, runs, axes)
        self._check_data(found, digests or {})
        self._check_families(found, runs)
        if not mix_code:
            self._check_code(found)
        for record in found:
            if record.result is None and record.code != code_version():
                shutil.rmtree(record.folder)
        (self.folder / RUNS).mkdir(parents=True, exist_ok=True)
        command = command_without_passwords(command)
        if command and command not in self.commands():
            lines = [*self._history(), {"command": command, "date": datetime.now().isoformat("T", "seconds")}]
            write_text(self.folder / HISTORY, "".join(json.dumps(line) + "\n" for line in lines))

    def commands(self) -> list[str]:
        """Those that added to the folder, in order."""
        return [line["command"] for line in self._history()]

    def _history(self) -> list[dict[str, Any]]:
        """The lines of the file of commands, without those that are damaged."""
        path, found = self.folder / HISTORY, []
        if path.is_file():
            for line in path.read_bytes().splitlines():
                with suppress(ValueError):
                    found.append(parse_json(line))
        lines = (line for line in found if isinstance(line, dict) and isinstance(line.get("command"), str))
        return [line | {"command": command_without_passwords(line["command"])} for line in lines]

    @contextmanager
    def driving(self) -> Iterator[None]:
        """Keep other drivers out.

        Raises:
            BlockingIOError: one is at work.
        """
        with lock(self.folder / ".driver", f"another einlinear is at work in {self.folder}"):
            yield

    def _read(self) -> Iterator[Record | ValueError]:
        for path in sorted((self.folder / RUNS).glob("*/")):
            if (path / RUN).exists():  # else a worker was stopped before it wrote anything
                try:
                    yield read_record(path)
                except ValueError as error:
                    yield error

    def _check_config(self, found: Collection[Record], runs: Collection[Run], axes: Collection[str]) -> None:
        """What is not varied has to be as it was."""
        there = _values(record.run.identity for record in found)
        here = _values(run.identity for run in runs)
        differences = [
            f"{name} was {' and '.join(map(repr, sorted(there[name], key=str)))}, now {value!r}"
            for name, values in here.items()
            if name not in axes and name in there  # else it means nothing to the runs that are there
            for value in values - there[name]
        ]
        if differences:
            raise ValueError(
                f"{self.folder} holds results of another config: {'; '.join(differences)}. "
                "Name another folder (--out), or repeat the config to add to this one"
            )

    def _check_data(self, found: Collection[Record], digests: Mapping[Data, str]) -> None:
        for record in found:
            name = record.run.data.data
            if digests.get(record.run.data, record.digest) != record.digest:
                raise ValueError(
                    f"{self.folder} holds runs on other data of the name {name} ({record.source}): it has changed "
                    "since. Name another folder (--out)"
                )

    def _check_families(self, found: Collection[Record], runs: Iterable[Run]) -> None:
        """A name that a user has registered has to stand for what it did."""
        now = {(run.model.structure, run.model.width): run.pattern for run in runs}
        for record in found:
            name = record.run.model.structure
            if now.get((name, record.run.model.width), record.pattern) != record.pattern:
                raise ValueError(
                    f"{self.folder} holds runs in which {name} was another structure ({record.pattern}). Name another "
                    "folder (--out)"
                )

    def _check_code(self, found: Collection[Record]) -> None:
        others = sorted({record.code for record in found} - {code_version()})
        if others:
            raise ValueError(
                f"{self.folder} holds runs that another code made ({', '.join(others)}; this is {code_version()}), "
                "which may not be comparable. Name another folder (--out), go on with that version, or mix them "
                "(--mix-code): the table says which run is whose"
            )


def open_store(folder: str | Path) -> Store:
    """A results folder that is there already.

    Raises:
        ValueError: it is none.
    """
    store = Store(Path(folder))
    if not (store.folder / RUNS).is_dir():
        raise ValueError(
            f"{folder} holds no results of einlinear ({store.folder / RUNS} is missing); "
            "name the folder of a compare, a sweep or a search"
        )
    return store


def _values(options: Iterable[Mapping[str, Any]]) -> dict[str, set[Any]]:
    """Every option with all values that it has."""
    values: dict[str, set[Any]] = {}
    for own in options:
        for name, value in own.items():
            values.setdefault(name, set()).add(tuple(value) if isinstance(value, list) else value)
    return values
