"""A sweep on a Ray cluster of two worker processes, one of which dies: the table that local mode gives."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from einlinear.experiments.runs.store import Store
from einlinear.experiments.runs.table import read_table
from einlinear.experiments.sweeps.sweep import do, make_sweep
from einlinear.experiments.sweeps.workers import Workers

SWEEP: dict[str, Any] = {
    "settings": {"data": "digits", "depth": 1, "batch_size": 64, "steps": 150, "checkpoint_every": 5, "threads": 1},
    "grid": {"width": [16, 32], "structure": ["dense", "btt"], "seed": [0, 1]},
}
TIMES = {"step_seconds", "folder"}


def table(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: {name: row[name] for name in row.keys() - TIMES} for row in read_table(folder)}


def drive(folder: Path) -> None:
    """In a process of its own: Ray leaves threads and warnings behind."""
    import ray

    from einlinear.experiments.sweeps.cluster import Cluster

    sweep = make_sweep(SWEEP)
    store = Store(folder)
    store.open(sweep.runs, sweep.axes)
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error")
    killed: list[int] = []

    def kill_one(_: object) -> None:
        """The first process that has saved a checkpoint."""
        while not killed:
            time.sleep(0.05)
            for lock in folder.glob("runs/*/checkpoints/step-*/../../.lock"):
                holder = holder_of(lock.resolve())
                if holder:
                    os.kill(holder, signal.SIGKILL)
                    killed.append(holder)
                    return

    waiting = True

    def watch(event: Any) -> None:
        nonlocal waiting
        if waiting:  # all runs have been handed to the cluster
            waiting = False
            kill_one(event)

    failed = do(sweep.runs, store, Cluster(), watch)
    (folder / "done.json").write_text(json.dumps({"failed": [e.message for e in failed], "killed": len(killed)}))


def holder_of(path: Path) -> int | None:
    """The process that has a file open."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(link) == str(path) for link in (process / "fd").iterdir()):
                return int(process.name)
        except OSError:
            continue
    return None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it finds processes in /proc")
def test_a_cluster_gives_the_table_of_local_workers(tmp_path: Path) -> None:
    if os.environ.get("CI") != "true":
        pytest.importorskip("ray", reason="needs ray: pip install 'einlinear[ray]'")
    (tmp_path / "ray").mkdir()
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.experiments.test_cluster", str(tmp_path / "ray")]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "ray" / "done.json").read_text()) == {"failed": [], "killed": 1}

    sweep = make_sweep(SWEEP)
    store = Store(tmp_path / "local")
    store.open(sweep.runs, sweep.axes)
    assert do(sweep.runs, store, Workers(2)) == []
    on_ray, local = table(tmp_path / "ray"), table(tmp_path / "local")
    assert len(local) == 8
    assert on_ray == local


if __name__ == "__main__":
    drive(Path(sys.argv[1]))
