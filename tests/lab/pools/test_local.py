"""Worker processes: killed, dying, each with its GPU."""

import json
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from tests.lab.pools.run_sweeps import FOUR, SETTINGS, results, run_sweep
from tests.lab.pools.tables import read_table

from einlinear_lab.pools import local
from einlinear_lab.pools.local import LocalPool
from einlinear_lab.pools.pool import run_missing
from einlinear_lab.runs.store import Store
from einlinear_lab.sweeps.sweep import make_sweep

KILLS = int(os.environ.get("EINLINEAR_KILLS") or 5)
SURVIVOR = {
    "config": SETTINGS | {"steps": 300, "checkpoint_every": 10, "log_every": 1, "batch_size": 32},
    "grid": {"structure": ["dense", "btt"], "seed": [0, 1]},
}


def drive(folder: Path) -> None:
    sweep = make_sweep(SURVIVOR)
    store = Store(folder)
    store.open(sweep.runs, sweep.axes)
    sys.exit(len(run_missing(sweep.runs, store, LocalPool(2))))


def started(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process forked from one that has imported torch already."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["einlinear_lab.runs.execution"])
    process = processes.Process(target=target, args=arguments)
    process.start()
    return process


def children(pid: int) -> list[int]:
    """Of a process, and of those in turn."""
    own = Path(f"/proc/{pid}/task/{pid}/children")
    direct = [int(word) for word in own.read_text().split()] if own.exists() else []
    return direct + [grandchild for child in direct for grandchild in children(child)]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it finds processes in /proc")
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """A driver and workers: every run ends as if there had been no kill, no result is lost or doubled.

    With EINLINEAR_KILLS=100, that many.
    """
    whole = tmp_path / "whole"
    run_sweep(make_sweep(SURVIVOR), whole, LocalPool(2))
    folder, draw, kills = tmp_path / "killed", random.Random(0), 0
    while True:
        driver = started(drive, folder)
        assert driver.pid is not None
        while kills < KILLS:
            driver.join(draw.uniform(0.05, 0.3))
            if not driver.is_alive():
                break
            found = [pid for pid in children(driver.pid) if is_worker(pid)]
            if not found:  # still starting
                continue
            victim = driver.pid if kills % 5 == 2 else draw.choice(found)
            os.kill(victim, signal.SIGKILL)
            kills += 1
        driver.join(120)
        if driver.is_alive():
            driver.kill()
            pytest.fail("the driver does not end")
        if driver.exitcode == 0:
            break
    assert kills == KILLS
    assert results(folder) == results(whole)
    assert len(read_table(folder)) == 4
    for record in Store(folder).records():
        lines = (record.folder / "metrics.jsonl").read_text().splitlines()
        steps = [line["step"] for line in map(json.loads, lines) if "train_loss" in line]
        assert steps == list(range(1, 301))


def is_worker(pid: int) -> bool:
    """A process that has started a run: it holds the lock of its folder."""
    try:
        return any(".lock" in os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


def test_a_process_that_always_dies_fails_its_run(tmp_path: Path) -> None:
    seen = run_sweep(make_sweep({"config": SETTINGS}), tmp_path, LocalPool(1, setup=(die,)))
    assert [event.status for event in seen] == ["lost"] * (local.ATTEMPTS - 1) + ["failed"]
    assert "died 3 times" in seen[-1].message


@pytest.mark.parametrize(("visible", "seen"), [(None, {"0", "1"}), ("3,GPU-5", {"3", "GPU-5"})])
def test_each_process_sees_one_gpu(
    visible: str | None, seen: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    run_sweep(make_sweep(FOUR), tmp_path, LocalPool(3, setup=(partial(note_gpu, tmp_path),)))
    found = [path.read_text() for path in tmp_path.glob("gpu-*")]
    assert len(found) == 3
    assert set(found) == seen


def test_a_process_that_died_is_replaced_on_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,8")
    run_sweep(make_sweep({"config": SETTINGS}), tmp_path, LocalPool(1, setup=(partial(note_gpu, tmp_path), die)))
    assert [path.read_text() for path in tmp_path.glob("gpu-*")][:3] == ["7", "7", "7"]


def test_runs_on_gpus_get_a_process_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(local, "cpu_count", lambda: 16)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    grid = {"grid": {"seed": list(range(20))}}
    on_cpu, on_gpu = (make_sweep({"config": SETTINGS | {"device": d}} | grid).runs for d in ("cpu", "cuda"))
    assert (local.default_workers(on_cpu), local.default_workers(on_gpu), local.default_workers(on_gpu[:2])) == (
        16,
        3,
        2,
    )


def note_gpu(folder: Path) -> None:
    (folder / f"gpu-{os.getpid()}").write_text(os.environ["CUDA_VISIBLE_DEVICES"])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
