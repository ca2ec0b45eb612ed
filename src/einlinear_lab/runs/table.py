"""SQLite table of the runs of a results folder. It can be queried during a sweep, and rebuilt from the runs' files.

sqlite3 FOLDER/runs.sqlite "select structure, width, lr, train_loss from runs where status = 'finished'"
"""

from __future__ import annotations

import json
import sqlite3
import warnings
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from einlinear_lab.runs.records import Record, Result, read_record
from einlinear_lab.runs.run import Run

FILE = "runs.sqlite"
# Options of runs have the same names.
_NAMES = {"steps": "steps_made"}
_RESULTS = {field.name: _NAMES.get(field.name, field.name) for field in fields(Result) if field.name != "metrics"}
# Seconds to wait for a reader's lock.
_PATIENCE = 1


class RunTable:
    """One row per run: its key, folder and status; its config; its results and metrics.

    Status is "waiting", "running", "finished", "diverged", "lost" or "failed". Errors become warnings; rows that could
    not be written are written with the next row.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._connection = sqlite3.connect(self._path, isolation_level=None, timeout=_PATIENCE)
        # Empty until the table exists.
        self._columns: set[str] = set()
        self._statuses: dict[str, str] = {}
        self._unwritten: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> RunTable:
        return self

    def __exit__(self, *_: object) -> None:
        if self._unwritten:
            self._write()
        self._connection.close()

    def rebuild(self, records: Iterable[Record], waiting: Iterable[Run]) -> None:
        """Create the table from the finished runs on disk, and the runs to be done."""
        rows = [_row(run, None, "waiting") for run in waiting]
        rows += [_of_record(record) for record in records if record.result]
        self._columns, self._unwritten = set(), {row["key"]: row for row in rows}
        self._write()

    def note(self, run: Run, folder: Path, status: str, message: str = "") -> None:
        """Write the row of a run if its status is new; results of a finished run are read from its folder."""
        if self._statuses.get(run.key) == status:
            return
        self._statuses[run.key] = status
        row = _row(run, folder, status, message)
        if status == "finished":
            try:
                row = _of_record(read_record(folder))
            except ValueError as error:
                warnings.warn(f"the table of the runs lacks the results of one: {error}", stacklevel=2)
        self._unwritten[run.key] = row
        self._write()

    def _write(self) -> None:
        """Write all unwritten rows in one transaction."""
        columns = set(self._columns)
        try:
            self._connection.execute("begin immediate")
            if not columns:
                columns = {"key", "folder", "status", "message", "code", *_RESULTS.values()}
                others = ", ".join(map(_quoted, sorted(columns - {"key"})))
                self._connection.execute("drop table if exists runs")
                self._connection.execute(f"create table runs (key text primary key, {others})")
            for row in self._unwritten.values():
                for name in row.keys() - columns:
                    self._connection.execute(f"alter table runs add column {_quoted(name)}")
                columns |= row.keys()
                names, places = ", ".join(map(_quoted, row)), ", ".join("?" * len(row))
                self._connection.execute(f"insert or replace into runs ({names}) values ({places})", list(row.values()))
            self._connection.execute("commit")
        except sqlite3.Error as error:
            if self._connection.in_transaction:
                self._connection.execute("rollback")
            warnings.warn(f"the table {self._path} cannot be written now: {error}", stacklevel=3)
        else:
            self._columns = columns
            self._unwritten.clear()


def _of_record(record: Record) -> dict[str, Any]:
    if record.result is None:
        raise ValueError(f"the run in {record.folder} has no result that can be seen")
    row = _row(record.run, record.folder, "diverged" if record.result.diverged else "finished")
    results = {column: getattr(record.result, name) for name, column in _RESULTS.items()}
    return row | results | record.result.metrics | {"code": record.code}


def _row(run: Run, folder: Path | None, status: str, message: str = "") -> dict[str, Any]:
    options = {name: json.dumps(v) if isinstance(v, list) else v for name, v in run.config.items()}
    return {"key": run.key, "folder": folder and folder.name, "status": status, "message": message, **options}


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
