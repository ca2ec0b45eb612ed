"""Reading the table of a results folder, as its users do."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from einlinear_lab.runs.table import FILE


def read_table(folder: Path) -> list[dict[str, Any]]:
    """Its rows."""
    with closing(sqlite3.connect(f"file:{folder / FILE}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute("select * from runs order by key")]
