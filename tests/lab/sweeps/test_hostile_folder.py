"""Commands in a folder whose files are called as modules: none of them is executed, by whatever process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import einlinear

# some that Python's own start needs, some that its multiprocessing does, and some of this library
MODULES = ("types", "enum", "socket", "pickle", "selectors", "struct", "torch", "numpy", "einlinear", "joblib", "ray")
SWEEP = """
[config]
data = "digits"
depth = 1
batch_size = 256
steps = 4
width = 16
threads = 1
"""
RUN = ("--data", "digits", "batch_size=256", "steps=4", "depth=1", "threads=1")
COMMANDS = (
    ("sweep", "sweep.toml", "--workers", "1", "--out", "swept"),
    ("compare", "--structures", "dense", "--widths", "16", "--seeds", "1", "--workers", "1", *RUN, "--out", "compared"),
    ("search", "data=digits", *RUN[2:], "--budget", "8k", "--trials", "1", "--workers", "1", "--out", "searched"),
)
# As the command `einlinear` does, whose own folder comes first on Python's path.
SCRIPT = """
import sys

from einlinear_lab.cli.app import main

if __name__ == "__main__":
    for arguments in {commands!r}:
        sys.argv = ["einlinear", *arguments]
        try:
            main()
        except SystemExit as error:
            assert not error.code, (arguments, error.code)
"""


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in MODULES:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'a').write('{name} '); import nothing\n")
    (folder / "sweep.toml").write_text(SWEEP)
    return folder


def start(hostile: Path, *arguments: str) -> None:
    library = Path(einlinear.__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"} | {
        "PYTHONPATH": str(library),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=hostile, env=environment, capture_output=True, text=True, timeout=300)
    trace = hostile.parent / "trace"
    assert not trace.exists(), f"executed: {trace.read_text()}"
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def script(hostile: Path, *commands: tuple[str, ...]) -> str:
    (hostile.parent / "scripts").mkdir()
    path = hostile.parent / "scripts" / "einlinear_command.py"
    path.write_text(SCRIPT.format(commands=commands))
    return str(path)


@pytest.mark.slow
def test_processes_of_this_machine(hostile: Path) -> None:
    start(hostile, script(hostile, *COMMANDS))
    for out in ("swept", "compared", "searched"):
        assert list(hostile.glob(f"{out}/runs/*/result.json")), out


@pytest.mark.slow
def test_processes_of_a_cluster(hostile: Path) -> None:
    if os.environ.get("CI") != "true":
        pytest.importorskip("ray", reason="needs ray: pip install ray")
    start(hostile, script(hostile, ("sweep", "sweep.toml", "--on", "ray", "--out", "swept")))
    assert list(hostile.glob("swept/runs/*/result.json"))


def test_python_m(hostile: Path) -> None:
    """Python itself looks into the current folder before the library is there; of what comes later, nothing is."""
    for name in MODULES:
        if name not in ("joblib", "ray"):
            (hostile / f"{name}.py").unlink()
    (hostile / "typer.py").write_text((hostile / "joblib.py").read_text())
    start(hostile, "-m", "einlinear", "recipes")
