"""The scripts in examples/ run from beginning to end, on the least there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.cli.command import run
from tests.data.samples import needs, prose

ROOT = Path(__file__).parent.parent


def test_dense_to_sparse(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(prose(2000))
    code, _, err = run("prepare", tmp_path / "text.txt", "--out", tmp_path / "tokens")
    assert (code, err) == (0, "")
    command = [sys.executable, ROOT / "examples" / "dense_to_sparse.py", "--data", tmp_path / "tokens"]
    command += ["--width", "64", "--steps", "24", "--out", tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    tables = [
        subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, env=environment).stdout
        for _ in range(2)
    ]
    assert tables[0] == tables[1]  # all of it is kept
    rows = re.findall(r"^\| ([a-z-]+) \| ([\d.]+) \| ([\d,]+) \| [\d.]+ \|$", tables[0], re.MULTILINE)
    assert [name for name, *_ in rows] == ["dense", "monarch", "sparse-to-dense", "dense-to-sparse"]
    macs = {name: int(count.replace(",", "")) for name, _, count in rows}
    assert macs["sparse-to-dense"] == macs["dense"]
    assert macs["dense-to-sparse"] < 1.1 * macs["monarch"] < macs["dense"]


@needs("transformers")
def test_compressed_speed() -> None:
    command = [sys.executable, str(ROOT / "examples" / "compressed_speed.py"), "--tokens", "8", "--rounds", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    out = subprocess.run(
        [*command, "--layers", "1"], capture_output=True, text=True, check=True, env=environment
    ).stdout
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \| (\d+)% \| [\d,]+ \| [\d.]+ \| (–|[\d,.]+) \| (–|[\d.]+) \|$", out, re.M)
    assert len(rows) == 2 * (1 + 4 * 3)
    assert [row[2] == "–" for row in rows] == [True] * 13 + [False] * 13  # an encoder generates nothing
