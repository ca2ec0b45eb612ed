"""The table of all runs of a results folder, in SQLite: it can be queried while they run, and is made anew at will.

sqlite3 FOLDER/runs.sqlite "select structure, width, lr, train_loss from runs where status = 'finished'"
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from einlinear.experiments.runs.records import Record, Result, read_record
from einlinear.experiments.runs.run import Run

FILE = "runs.sqlite"
_RESULTS = tuple(field.name for field in fields(Result) if field.name != "measures")


class Table:
    """One row per run: its key, folder and status; its options; its results and measures.

    Status is "waiting", "running", "finished", "diverged", "lost" or "failed".
    """

    def __init__(self, folder: Path) -> None:
        self._connection = sqlite3.connect(folder / FILE, isolation_level=None)
        self._columns: set[str] = set()

    def __enter__(self) -> Table:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def rebuild(self, records: Iterable[Record], waiting: Iterable[Run]) -> None:
        """Make it from what is on disk, and the runs that are to be done."""
        self._connection.execute("begin")
        self._connection.execute("drop table if exists runs")
        self._connection.execute("create table runs (key text primary key, folder text, status text, message text)")
        self._columns = {"key", "folder", "status", "message"}
        for run in waiting:
            self._write(_row(run, None, "waiting"))
        for record in records:
            if record.result:
                self._write(_of_record(record))
        self._connection.execute("commit")

    def note(self, run: Run, folder: Path, status: str, message: str = "") -> None:
        """What became of a run; of a finished one, its results are read from its folder."""
        self._write(_of_record(read_record(folder)) if status == "finished" else _row(run, folder, status, message))

    def _write(self, row: dict[str, Any]) -> None:
        for name in row.keys() - self._columns:
            self._connection.execute(f"alter table runs add column {_quoted(name)}")
        self._columns |= row.keys()
        names, places = ", ".join(map(_quoted, row)), ", ".join("?" * len(row))
        self._connection.execute(f"insert or replace into runs ({names}) values ({places})", list(row.values()))


def read_table(folder: Path) -> list[dict[str, Any]]:
    """The rows of a results folder's table."""
    with sqlite3.connect(f"file:{folder / FILE}?mode=ro", uri=True) as connection:
        connection.row_factory = sqlite3.Row
        rows = [dict(row) for row in connection.execute("select * from runs order by key")]
    connection.close()
    return rows


def _of_record(record: Record) -> dict[str, Any]:
    assert record.result is not None
    row = _row(record.run, record.folder, "diverged" if record.result.diverged else "finished")
    results = {name: value for name, value in asdict(record.result).items() if name in _RESULTS}
    return row | results | record.result.measures | {"code": record.code}


def _row(run: Run, folder: Path | None, status: str, message: str = "") -> dict[str, Any]:
    options = {name: json.dumps(v) if isinstance(v, list) else v for name, v in run.options.items()}
    return {"key": run.key, "folder": folder and folder.name, "status": status, "message": message, **options}


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
