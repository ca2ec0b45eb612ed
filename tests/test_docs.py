"""The examples of the README and of the contributing guide run."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import einlinear as el
from einlinear.structures import FAMILIES
from tests.families import SAMPLES

ROOT = Path(__file__).parent.parent


def blocks(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example, from top to bottom: later ones use the names of earlier ones."""
    monkeypatch.setattr("einlinear.structures.families.FAMILIES", dict(FAMILIES))
    torch.manual_seed(0)
    first, invent, compress, schedule = blocks("README.md")
    names: dict[str, Any] = {}

    def run(code: str) -> None:
        exec(compile(code, "README.md", "exec"), names)

    run(first)
    assert isinstance(names["layer"], el.Linear)
    assert round(names["layer"].structure.macs / (1024 * 4096), 3) == 0.094

    run(invent)
    assert el.structure(names["mine"], 64, 64).macs == 1280
    assert [type(layer).__name__ for layer in names["model"]] == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    assert isinstance(names["model"][0], el.Linear)
    assert float(names["loss"].detach()) < math.log(10)  # of guessing

    run(compress)
    assert 0 < float(names["error"].detach()) < 1

    run(schedule)
    rates = [group["lr"] / group["lr_mult"] for group in names["optimizer"].param_groups]
    assert len({group["lr_mult"] for group in names["groups"]}) > 1
    assert rates == pytest.approx(len(rates) * rates[:1])  # the scheduler kept what structure-aware muP set


def test_contributing(tmp_path: Path) -> None:
    """Do what the guide says, in a copy: its two pieces of code are all that the conformance suite needs."""
    assert "grouped" not in FAMILIES
    assert "grouped" not in SAMPLES
    family, row = blocks("CONTRIBUTING.md")
    for folder in ("src", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    families = tmp_path / "src/einlinear/structures/families.py"
    families.write_text(f"{families.read_text()}\n\n{family}")
    samples = tmp_path / "tests/families.py"
    table = samples.read_text()
    assert table.count("\n}\n") == 1  # the end of SAMPLES
    samples.write_text(table.replace("\n}\n", f"\n{row}}}\n"))

    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "grouped or every_family"]
    done = subprocess.run(
        [*command, "tests/test_conformance.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) > 2 * 5  # of both specs of the row
