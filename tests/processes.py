"""Processes that tests compare with one: started once, they write a folder that all processes of pytest read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder that the first process of pytest to need it has filled by `make`."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with filelock.FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            folder.mkdir()
            make(folder)
    return folder


def run_script(script: str, folder: Path) -> None:
    """Run a Python file that starts processes of its own, without a GPU, which one of them would take."""
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, script, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
