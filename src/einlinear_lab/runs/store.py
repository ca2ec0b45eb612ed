"""Results folders: the runs of an experiment, each in its own folder, which differ only in its axes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from einlinear.files import lock, parse_json, write_text
from einlinear_lab.runs.data_config import DataConfig
from einlinear_lab.runs.passwords import command_without_passwords
from einlinear_lab.runs.records import METRICS, RUN, Record, code_version, read_record
from einlinear_lab.runs.run import Run
from einlinear_lab.training import metrics

RUNS, HISTORY = "runs", "history.jsonl"
_ANOTHER = "Name another folder (--out)"


@dataclass(frozen=True)
class Store:
    """Results folder of one experiment.

    FOLDER/runs/NAME/      folder of a run, see execution.py
    FOLDER/history.jsonl   commands that added runs
    FOLDER/runs.sqlite     table of all runs, see table.py
    """

    folder: Path

    def path(self, run: Run) -> Path:
        return self.folder / RUNS / run.name

    def records(self) -> list[Record]:
        """Return all runs that were started, except those with damaged files."""
        return [record for record in self._read() if isinstance(record, Record)]

    def damaged(self) -> list[str]:
        """Return the errors of runs with damaged files."""
        return [str(error) for error in self._read() if isinstance(error, ValueError)]

    def damaged_lines(self) -> list[str]:
        """Return file, line number and error of damaged metrics, which are skipped."""
        return [text for record in self.records() for text in metrics.damaged(record.folder / METRICS)]

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Return the unfinished ones of these runs."""
        finished = {record.run.key for record in self.records() if record.result}
        return [run for run in runs if run.key not in finished]

    def open(
        self,
        runs: Collection[Run],
        axes: Collection[str],
        command: str = "",
        mix_code: bool = False,
        digests: Mapping[DataConfig, str] | None = None,
    ) -> None:
        """Prepare the folder for more runs.

        Args:
            runs: runs to add.
            axes: options in which runs may differ from existing runs and from each other.
            command: command that adds the runs, for history.jsonl.
            mix_code: whether to accept finished runs of another code version; its unfinished runs start anew.
            digests: of the data, to detect changed data of the same name.

        Raises:
            ValueError: the folder holds other files, or runs of another config, other data or another code version.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; name a folder for the results")
        if self.folder.exists() and any(self.folder.iterdir()) and not (self.folder / RUNS).is_dir():
            raise ValueError(f"{self.folder} holds files that are no results of einlinear; name another folder")
        records = self.records()
        self._check_config(records, runs, axes)
        self._check_data(records, runs, digests or {})
        if not mix_code:
            self._check_code(records)
        for record in records:
            if record.result is None and record.code != code_version():
                shutil.rmtree(record.folder)
        (self.folder / RUNS).mkdir(parents=True, exist_ok=True)
        command = command_without_passwords(command)
        if command and command not in self.commands():
            lines = [*self._history(), {"command": command, "date": datetime.now().isoformat("T", "seconds")}]
            write_text(self.folder / HISTORY, "".join(json.dumps(line) + "\n" for line in lines))

    def commands(self) -> list[str]:
        """Commands that added runs, in order."""
        return [line["command"] for line in self._history()]

    def _history(self) -> list[dict[str, Any]]:
        path, lines = self.folder / HISTORY, []
        if path.is_file():
            for line in path.read_bytes().splitlines():
                with suppress(ValueError, KeyError, TypeError, AttributeError):
                    entry = parse_json(line)
                    lines.append(entry | {"command": command_without_passwords(entry["command"])})
        return lines

    def driving(self) -> AbstractContextManager[None]:
        """Lock out other drivers; raise BlockingIOError if another driver has the lock."""
        return lock(self.folder / ".driver", f"another einlinear is at work in {self.folder}")

    def _read(self) -> Iterator[Record | ValueError]:
        for path in sorted((self.folder / RUNS).glob("*/")):
            # A worker that is stopped early leaves a folder without files.
            if (path / RUN).exists():
                try:
                    yield read_record(path)
                except ValueError as error:
                    yield error

    def _check_config(self, records: Collection[Record], runs: Collection[Run], axes: Collection[str]) -> None:
        old = _values(record.run.hyperparameters for record in records)
        differences = [
            f"{name} was {' and '.join(map(repr, sorted(old[name], key=str)))}, now {value!r}"
            for name, values in _values(run.hyperparameters for run in runs).items()
            if name not in axes and name in old
            for value in values - old[name]
        ]
        if differences:
            raise ValueError(
                f"{self.folder} holds results of another config: {'; '.join(differences)}. {_ANOTHER}, or repeat the "
                "config to add to this one"
            )

    def _check_data(
        self, records: Collection[Record], runs: Collection[Run], digests: Mapping[DataConfig, str]
    ) -> None:
        """Compare the data and the user's families with those of existing runs of the same names."""
        patterns = {(run.model.structure, run.model.width): run.pattern for run in runs}
        for record in records:
            name, structure = record.run.data.data, record.run.model.structure
            difference = ""
            if digests.get(record.run.data, record.data_digest) != record.data_digest:
                difference = f"on other data of the name {name} ({record.data_source}): it has changed since"
            if patterns.get((structure, record.run.model.width), record.pattern) != record.pattern:
                difference = f"in which {structure} was another structure ({record.pattern})"
            if difference:
                raise ValueError(f"{self.folder} holds runs {difference}. {_ANOTHER}")

    def _check_code(self, records: Collection[Record]) -> None:
        others = sorted({record.code for record in records} - {code_version()})
        if others:
            raise ValueError(
                f"{self.folder} holds runs that another code made ({', '.join(others)}; this is {code_version()}), "
                f"which may not be comparable. {_ANOTHER}, use that version, or mix them (--mix-code): the table names "
                "the code of each run"
            )


def open_store(folder: str | Path) -> Store:
    """Return the store of an existing results folder. Raises ValueError if the folder is none."""
    store = Store(Path(folder))
    if not (store.folder / RUNS).is_dir():
        raise ValueError(
            f"{folder} holds no results of einlinear ({store.folder / RUNS} is missing); "
            "name the folder of a compare, a sweep or a search"
        )
    return store


def _values(options: Iterable[Mapping[str, Any]]) -> dict[str, set[Any]]:
    values: dict[str, set[Any]] = {}
    for each in options:
        for name, value in each.items():
            values.setdefault(name, set()).add(tuple(value) if isinstance(value, list) else value)
    return values
