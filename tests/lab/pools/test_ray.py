"""What a worker of a cluster does. On one of two processes: a sweep, though one dies, as in local mode; a search."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState
from PIL import Image
from tests.lab.pools.tables import read_table

from einlinear.files import lock
from einlinear_lab.pools import local
from einlinear_lab.pools import ray as ray_pool
from einlinear_lab.pools.local import LocalPool
from einlinear_lab.pools.pool import run_missing
from einlinear_lab.runs.records import read_record
from einlinear_lab.runs.run import Run
from einlinear_lab.runs.store import Store
from einlinear_lab.search.config import SearchConfig
from einlinear_lab.search.search import Search
from einlinear_lab.sweeps.sweep import make_sweep

SWEEP: dict[str, Any] = {
    "config": {"data": "digits", "depth": 1, "batch_size": 64, "steps": 60, "checkpoint_every": 5, "threads": 1},
    "grid": {"width": [16, 32], "structure": ["dense", "btt"]},
}
QUICK = Run.of({"data": "digits", "width": 16, "depth": 1, "batch_size": 128, "steps": 2}).config
TIMES = {"step_seconds", "folder"}


@pytest.fixture
def new_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after the start of a process; where it is in the end does not matter."""
    monkeypatch.setattr(ray_pool, "_set_up", False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("new_worker")
def test_a_worker_takes_paths_as_the_driver_does(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "driver" / "pets" / label).mkdir(parents=True)
        for i in range(9):
            image = Image.fromarray(random.integers(0, 256, (6, 6), dtype=np.uint8))
            image.save(tmp_path / "driver" / "pets" / label / f"{i}.png")
    options = QUICK | {"data": "pets", "batch_size": 4}
    assert ray_pool._attempt(options, "runs/one", str(tmp_path / "driver"), ()) == {"status": "finished"}
    assert read_record(tmp_path / "driver" / "runs" / "one").run.data.data == "pets"


@pytest.mark.usefixtures("new_worker")
def test_a_worker_is_set_up_once(tmp_path: Path) -> None:
    calls: list[str] = []
    for name in ("one", "two"):
        assert ray_pool._attempt(QUICK, name, str(tmp_path), (lambda: calls.append("x"),))["status"] == "finished"
    assert calls == ["x"]


@pytest.mark.usefixtures("new_worker")
def test_a_bug_is_told_with_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "execute", lambda *_: {}["bug"])
    told = ray_pool._attempt(QUICK, "one", str(tmp_path), ())
    assert told["status"] == "failed"
    assert "Traceback" in told["message"]
    assert "KeyError: 'bug'" in told["message"]


@pytest.mark.usefixtures("new_worker")
def test_a_worker_waits_for_one_that_was_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").mkdir()
    with lock(tmp_path / "one" / ".lock", "nobody"):
        with monkeypatch.context() as patched:
            patched.setattr(local, "_PATIENCE", 0)
            told = ray_pool._attempt(QUICK, "one", str(tmp_path), ())
        assert told == {"status": "failed", "message": "another process is at work in one"}
        threading.Timer(0.5, (tmp_path / "one" / ".lock").unlink).start()  # it ends
        assert ray_pool._attempt(QUICK, "one", str(tmp_path), ()) == {"status": "finished"}


def table(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: {name: row[name] for name in row.keys() - TIMES} for row in read_table(folder)}


def drive(folder: Path) -> None:
    """In a process of its own: Ray leaves threads and warnings behind."""
    import ray

    from einlinear_lab.pools.ray import RayPool

    sweep = make_sweep(SWEEP)
    store = Store(folder)
    store.open(sweep.runs, sweep.axes)
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error")
    killed: list[int] = []
    statuses: list[str] = []
    is_over = threading.Event()

    def kill_one() -> None:
        """The first process that has saved a checkpoint."""
        while not killed and not is_over.wait(0.05):
            for lock_file in folder.glob("runs/*/checkpoints/step-*/../../.lock"):
                if not killed and (holder := holder_of(lock_file.resolve())):
                    os.kill(holder, signal.SIGKILL)
                    killed.append(holder)

    killer = threading.Thread(target=kill_one)
    killer.start()
    run_missing(sweep.runs, store, RayPool(), lambda event: statuses.append(event.status))
    is_over.set()
    killer.join()
    options = {"data": "digits", "depth": 1, "batch_size": 128, "steps": 8, "threads": 1}
    search = Search(SearchConfig(budget=8_000, trials=2, options=options)).open(Store(folder / "search"))
    failed = [event.message for event in search.run_trials(RayPool())]
    told = {"statuses": statuses, "killed": len(killed), "failed": failed}
    told["searched"] = [trial.state == TrialState.COMPLETE for trial in search.study.trained()]
    (folder / "done.json").write_text(json.dumps(told))


def holder_of(path: Path) -> int | None:
    """The process that has a file open."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(link) == str(path) for link in (process / "fd").iterdir()):
                return int(process.name)
        except OSError:
            continue
    return None


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it finds processes in /proc")
def test_a_cluster_gives_the_table_of_local_workers(tmp_path: Path) -> None:
    if os.environ.get("CI") != "true":
        pytest.importorskip("ray", reason="needs ray: pip install ray")
    (tmp_path / "ray").mkdir()
    root = Path(__file__).parents[3]
    command = [sys.executable, "-m", "tests.lab.pools.test_ray", str(tmp_path / "ray")]
    # not behind whatever else runs on this machine, which on two cores would take all of them
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads((tmp_path / "ray" / "done.json").read_text())
    assert told == {"statuses": 4 * ["finished"], "killed": 1, "failed": [], "searched": 2 * [True]}

    sweep = make_sweep(SWEEP)
    store = Store(tmp_path / "local")
    store.open(sweep.runs, sweep.axes)
    assert run_missing(sweep.runs, store, LocalPool(2)) == []
    on_ray, local = table(tmp_path / "ray"), table(tmp_path / "local")
    assert len(local) == 4
    assert on_ray == local


if __name__ == "__main__":
    drive(Path(sys.argv[1]))
