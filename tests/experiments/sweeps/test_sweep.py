"""Sweeps: which runs a file describes, doing what is missing, and surviving whatever is killed."""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.experiments.sweeps.tables import read_table

import einlinear as el
from einlinear.experiments.runs import records, table
from einlinear.experiments.runs.check import check_runs
from einlinear.experiments.runs.data import _images
from einlinear.experiments.runs.execute import execute
from einlinear.experiments.runs.records import Result
from einlinear.experiments.runs.run import Run
from einlinear.experiments.runs.store import HISTORY, Store
from einlinear.experiments.runs.table import FILE, RunTable
from einlinear.experiments.sweeps import attempts, workers
from einlinear.experiments.sweeps.driver import Event, Job, Pool, do
from einlinear.experiments.sweeps.sweep import Sweep, make_sweep, read_sweep
from einlinear.experiments.sweeps.workers import Workers
from einlinear.structures import FAMILIES

SETTINGS: dict[str, Any] = {"data": "digits", "width": 16, "depth": 1, "batch_size": 128, "steps": 6}
FOUR: dict[str, Any] = {"settings": SETTINGS, "grid": {"structure": ["dense", "btt"], "seed": [0, 1]}}


def here(jobs: Sequence[Job]) -> Iterator[Event]:
    """A pool of this process alone."""
    for run, folder in jobs:
        execute(run, folder)
        yield Event(run, "finished")


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """What matters of every run, by its key: not how long it took."""
    found = {}
    for record in Store(folder).records():
        assert record.result is not None
        found[record.run.key] = {
            "train_loss": record.result.train_loss,
            "steps": record.result.steps,
            **record.result.measures,
        }
    return found


def carry_out(sweep: Sweep, folder: Path, pool: Pool = here, **options: Any) -> list[Event]:
    seen: list[Event] = []
    store = Store(folder)
    store.open(sweep.runs, sweep.axes, **options)
    do(sweep.runs, store, pool, seen.append)
    return seen


# Files


def test_settings_grid_and_parts(tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text("""
        [settings]
        data = "digits"
        steps = 6
        width = 64
        [grid]
        seed = [0, 1]
        lr = [1e-3, 3e-3]
        [[parts]]
        settings = { structure = "dense" }
        [[parts]]
        settings = { structure = "btt", lr = 1e-2 }
        grid = { width = [32, 48, 32] }
    """)
    sweep = read_sweep(path)
    dense = {(run.model.width, run.training.lr, run.seed) for run in sweep.runs if run.model.structure == "dense"}
    assert dense == {(64, lr, seed) for lr in (1e-3, 3e-3) for seed in (0, 1)}
    btt = [(run.model.width, run.training.lr, run.seed) for run in sweep.runs if run.model.structure == "btt"]
    assert sorted(btt) == [(width, 1e-2, seed) for width in (32, 48) for seed in (0, 1)]
    assert sweep.axes == {"structure", "seed", "lr", "width"}
    overridden = read_sweep(path, {"steps": "9", "seed": "3"})
    assert {(run.training.steps, run.seed) for run in overridden.runs} == {(9, 3)}
    (tmp_path / "sweep.json").write_text(json.dumps(FOUR))
    assert len(read_sweep(tmp_path / "sweep.json").runs) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"setings": {}}, "has no option 'setings': did you mean 'settings'"),
        ({"settings": SETTINGS, "parts": [{"grids": {}}]}, "a part of a sweep has no option 'grids'"),
        ({"settings": SETTINGS, "grid": {"lr": 1e-3}}, "the grid of lr must be a list of values, not 0.001"),
        ({"settings": SETTINGS, "grid": {"lr": []}}, "describes no runs"),
        (
            {"settings": SETTINGS, "parts": [{"settings": {"lr": 0.1}, "grid": {"lr": [0.1, 0.2]}}]},
            "a part of a sweep has lr in its settings and in its grid",
        ),
        ({"settings": SETTINGS, "grid": {"lerning_rate": [1]}}, "no option 'lerning_rate'"),
        ({"settings": SETTINGS, "grid": {"lr": [0.1, -1]}}, "lr must be a positive number, not -1"),
    ],
)
def test_a_wrong_file_says_what_is_right(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sweep(content)


def test_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[settings")
    with pytest.raises(ValueError, match=r"a\.toml cannot be read"):
        read_sweep(tmp_path / "a.toml")


# Folders


def test_the_same_sweep_again_does_nothing_and_more_can_be_added(tmp_path: Path) -> None:
    sweep = make_sweep(FOUR)
    seen = carry_out(sweep, tmp_path, command="first")
    assert sorted(event.run.key for event in seen if event.status == "finished") == sorted(
        run.key for run in sweep.runs
    )
    before = results(tmp_path)
    assert carry_out(sweep, tmp_path, command="first") == []
    more = make_sweep({**FOUR, "grid": {"structure": ["btt", "low_rank"], "seed": [1]}})
    (added,) = {event.run.key for event in carry_out(more, tmp_path, command="second")}
    assert results(tmp_path).keys() == before.keys() | {added}
    assert {key: results(tmp_path)[key] for key in before} == before
    assert Store(tmp_path).commands() == ["first", "second"]
    rows = {row["key"]: row for row in read_table(tmp_path)}
    assert rows.keys() == before.keys() | {added}
    assert {row["status"] for row in rows.values()} == {"finished"}
    for key, found in results(tmp_path).items():
        assert {name: rows[key][name] for name in found} == found


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"lr": 1e-2}, "lr was 0.003, now 0.01"),
        ({"steps": 7}, "steps was 6, now 7"),
        ({"betas": [0.9, 0.99]}, r"betas was \(0.9, 0.95\), now \(0.9, 0.99\)"),
    ],
)
def test_other_settings_are_refused(change: dict[str, Any], difference: str, tmp_path: Path) -> None:
    carry_out(make_sweep(FOUR), tmp_path)
    other = make_sweep({"settings": SETTINGS | change, "grid": FOUR["grid"]})
    with pytest.raises(ValueError, match=f"other settings: {difference}.*Name another folder"):
        Store(tmp_path).open(other.runs, other.axes)
    varied = make_sweep({"settings": SETTINGS, "grid": FOUR["grid"] | {name: [v] for name, v in change.items()}})
    Store(tmp_path).open(varied.runs, varied.axes)  # said to be varied: nothing is mixed up


def test_other_data_of_the_same_name_is_refused(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0)

    def draw() -> None:
        for label in ("cat", "dog"):
            (tmp_path / "pets" / label).mkdir(parents=True, exist_ok=True)
            for i in range(9):
                image = Image.fromarray(pixels.integers(0, 256, (6, 6), dtype=np.uint8))
                image.save(tmp_path / "pets" / label / f"{i}.png")

    draw()
    sweep = make_sweep({"settings": SETTINGS | {"data": str(tmp_path / "pets"), "batch_size": 4}})
    store = Store(tmp_path / "out")
    carry_out(sweep, store.folder)
    store.open(sweep.runs, sweep.axes, digests=check_runs(sweep.runs))
    draw()
    _images.cache_clear()
    with pytest.raises(ValueError, match=r"holds runs on other data of the name .*pets .*it has changed"):
        store.open(sweep.runs, sweep.axes, digests=check_runs(sweep.runs))


def test_another_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = make_sweep(FOUR)
    carry_out(sweep, tmp_path)
    monkeypatch.setattr("einlinear.experiments.runs.store.code_version", lambda: "9.9+beef")
    with pytest.raises(ValueError, match=r"another code made \(.*; this is 9.9\+beef\).*--mix-code"):
        Store(tmp_path).open(sweep.runs, sweep.axes)
    begun = Store(tmp_path).path(sweep.runs[0])
    (begun / "result.json").unlink()
    Store(tmp_path).open(sweep.runs, sweep.axes, mix_code=True)
    assert not begun.exists()  # a run is of one code
    assert len(results(tmp_path)) == 3


def test_a_family_that_has_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("einlinear.structures.families.FAMILIES", dict(FAMILIES))
    el.register_family("grouped", lambda: "(g a), g r a, g e r -> (g e) where g=4, r=2")
    sweep = make_sweep({"settings": SETTINGS | {"structure": "grouped"}})
    carry_out(sweep, tmp_path)
    Store(tmp_path).open(sweep.runs, sweep.axes)
    el.register_family("grouped", lambda: "(g a), g r a, g e r -> (g e) where g=4, r=3", overwrite=True)
    again = make_sweep({"settings": SETTINGS | {"structure": "grouped"}})
    with pytest.raises(ValueError, match="holds runs in which grouped was another structure"):
        Store(tmp_path).open(again.runs, again.axes)


def test_what_varies_the_data_can_be_given_again(tmp_path: Path) -> None:
    sweep = make_sweep({"settings": SETTINGS, "grid": {"limit": [200, 300]}})
    carry_out(sweep, tmp_path)
    Store(tmp_path).open(sweep.runs, sweep.axes, digests=check_runs(sweep.runs))


@pytest.mark.parametrize(("changed", "decides"), [("ops/tiles/tiles.cpp", True), ("cli/app.py", False)])
def test_the_code_is_that_of_the_sources_that_decide_how_a_run_goes(
    changed: str, decides: bool, tmp_path: Path
) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    copy = shutil.copytree(Path(el.__file__).parent, tmp_path / "einlinear", ignore=ignored)
    with (copy / changed).open("a") as file:
        file.write("\n")
    command = "from einlinear.experiments.runs.records import code_version; print(code_version())"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    here, there = records.code_version(), found.stdout.strip()
    assert (here != there) == decides
    assert here.split("+")[0] == there.split("+")[0] == el.__version__


def test_damaged_results_are_done_again(tmp_path: Path) -> None:
    sweep = make_sweep(FOUR)
    carry_out(sweep, tmp_path)
    whole = results(tmp_path)
    store = Store(tmp_path)
    victim = store.path(sweep.runs[1])
    (victim / "result.json").write_text((victim / "result.json").read_text()[:30])
    assert len(store.damaged()) == 1
    assert store.missing(sweep.runs) == [sweep.runs[1]]
    carry_out(sweep, tmp_path)
    assert results(tmp_path) == whole


def test_a_line_of_the_history_that_was_cut_off(tmp_path: Path) -> None:
    sweep = make_sweep(FOUR)
    store = Store(tmp_path)
    store.open(sweep.runs, sweep.axes, "first")
    with (tmp_path / HISTORY).open("a") as file:
        file.write('{"command": "sec')
    assert store.commands() == ["first"]
    store.open(sweep.runs, sweep.axes, "second")
    assert store.commands() == ["first", "second"]


def test_files_of_the_users_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="no results of einlinear; name another folder"):
        Store(tmp_path).open([], [])
    with pytest.raises(ValueError, match="is a file"):
        Store(tmp_path / "thesis.txt").open([], [])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_two_drivers_do_not_meet(tmp_path: Path) -> None:
    sweep = make_sweep(FOUR)
    store = Store(tmp_path)
    store.open(sweep.runs, sweep.axes)
    with store.driving(), pytest.raises(BlockingIOError, match="another einlinear is at work"):
        do(sweep.runs, store, here)


def test_a_run_that_fails_leaves_the_others(tmp_path: Path) -> None:
    sweep = make_sweep({"settings": SETTINGS, "grid": {"seed": [0, 1]}})
    seen = carry_out(sweep, tmp_path, Workers(2, setup=(refuse_seed_one,)))
    ends = {event.run.seed: event for event in seen if event.status != "running"}
    assert ends[0].status == "finished"
    assert (ends[1].status, ends[1].message) == ("failed", "not this one")
    assert {row["seed"]: row["status"] for row in read_table(tmp_path)} == {0: "finished", 1: "failed"}


def refuse_seed_one() -> None:
    """In a worker: from now on, a run of seed 1 is wrong."""

    def refuse(run: Run, *rest: Any) -> Result:
        if run.seed == 1:
            raise ValueError("not this one")
        return execute(run, *rest)

    attempts.execute = refuse  # type: ignore[assignment]


def test_what_cannot_be_built_is_found_before_anything_is_trained() -> None:
    with pytest.raises(ValueError, match="fewer than blocks"):
        check_runs(make_sweep({"settings": SETTINGS, "grid": {"structure": ["dense", "monarch(blocks=100)"]}}).runs)
    with pytest.raises(ValueError, match="unknown data 'digit'"):
        check_runs(make_sweep({"settings": SETTINGS | {"data": "digit"}}).runs)


def test_a_diverged_run_is_finished(tmp_path: Path) -> None:
    carry_out(make_sweep({"settings": SETTINGS | {"lr": 1e30, "steps": 50}}), tmp_path)
    (row,) = read_table(tmp_path)
    assert row["status"] == "diverged"
    assert row["steps_made"] < row["steps"] == 50
    assert Store(tmp_path).missing(make_sweep({"settings": SETTINGS | {"lr": 1e30, "steps": 50}}).runs) == []


def test_the_table_can_be_read_while_runs_are_on(tmp_path: Path) -> None:
    seen = []

    def look(event: Event) -> None:
        seen.append({row["status"] for row in read_table(tmp_path)})

    sweep = make_sweep(FOUR)
    store = Store(tmp_path)
    store.open(sweep.runs, sweep.axes)
    do(sweep.runs, store, Workers(1), look)
    assert {"running", "waiting"} <= seen[0]
    assert seen[-1] == {"finished"}
    (tmp_path / FILE).unlink()  # it is made anew
    do(sweep.runs, store, here)
    assert len(read_table(tmp_path)) == 4


DOCUMENTED = "select structure, width, lr, train_loss from runs where status = 'finished' order by train_loss"


def test_the_table_has_its_columns_before_the_first_run_ends(tmp_path: Path) -> None:
    found: list[int] = []

    def look(event: Event) -> None:
        with sqlite3.connect(tmp_path / FILE) as reader:
            found.append(len(reader.execute(DOCUMENTED).fetchall()))
        reader.close()

    sweep = make_sweep(FOUR)
    store = Store(tmp_path)
    store.open(sweep.runs, sweep.axes)
    do(sweep.runs, store, Workers(1), look)
    assert found[0] == 0
    assert found[-1] == 4


def test_the_table_is_written_when_a_status_changes(tmp_path: Path) -> None:
    runs = make_sweep(FOUR).runs
    with RunTable(tmp_path) as written:
        written.rebuild([], runs)
        reader = sqlite3.connect(tmp_path / FILE)
        versions = []
        for status in ("waiting", "running", "running", "running", "lost", "running", "failed"):
            if status != "waiting":
                written.note(runs[0], tmp_path / "a", status)
            versions += reader.execute("pragma data_version").fetchone()
        reader.close()
    assert [new - old for old, new in pairwise(versions)] == [1, 0, 0, 1, 1, 1]


def test_a_reader_that_holds_the_table_ends_no_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_PATIENCE", 0.05)
    readers: list[sqlite3.Connection] = []

    def read_on(event: Event) -> None:
        if not readers:
            readers.append(sqlite3.connect(tmp_path / FILE))
            readers[0].execute("begin")
            assert len(readers[0].execute("select * from runs").fetchall()) == 4

    sweep = make_sweep(FOUR)
    store = Store(tmp_path)
    store.open(sweep.runs, sweep.axes)
    with pytest.warns(UserWarning, match=r"runs\.sqlite cannot be written now: database is locked"):
        assert do(sweep.runs, store, here, read_on) == []
    assert len(results(tmp_path)) == 4
    readers[0].close()
    do(sweep.runs, store, here)
    assert {row["status"] for row in read_table(tmp_path)} == {"finished"}


def test_rows_that_a_reader_kept_out_are_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_PATIENCE", 0.05)
    runs = make_sweep(FOUR).runs
    reader = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    with RunTable(tmp_path) as written:
        written.rebuild([], runs)
        reader.execute("begin")
        reader.execute("select * from runs").fetchall()
        with pytest.warns(UserWarning, match="locked"):
            written.note(runs[0], tmp_path / "a", "running")
        reader.execute("commit")
        written.note(runs[1], tmp_path / "b", "running")
        assert statuses(tmp_path, runs) == ["running", "running", "waiting", "waiting"]
        reader.execute("begin")
        reader.execute("select * from runs").fetchall()
        with pytest.warns(UserWarning, match="locked"):
            written.note(runs[0], tmp_path / "a", "failed")
        reader.execute("commit")
    reader.close()
    assert statuses(tmp_path, runs) == ["failed", "running", "waiting", "waiting"]


def statuses(folder: Path, runs: Sequence[Run]) -> list[str]:
    found = {row["key"]: row["status"] for row in read_table(folder)}
    return [found[run.key] for run in runs]


@pytest.mark.parametrize(("damage", "message"), [("cut", "cannot be read"), ("gone", "no result that can be seen")])
def test_a_result_that_cannot_be_read_ends_no_sweep(damage: str, message: str, tmp_path: Path) -> None:
    def unlucky(jobs: Sequence[Job]) -> Iterator[Event]:
        for event, (_, folder) in zip(here(jobs), jobs):
            if folder == jobs[0][1]:
                (folder / "result.json").write_text("{")
                if damage == "gone":
                    (folder / "result.json").unlink()
            yield event

    with pytest.warns(UserWarning, match=message):
        carry_out(make_sweep(FOUR), tmp_path, unlucky)
    rows = read_table(tmp_path)
    assert [row["status"] for row in rows] == 4 * ["finished"]
    assert sum(row["train_loss"] is None for row in rows) == 1


def test_a_full_disk_is_said_and_what_was_done_stays(tmp_path: Path) -> None:
    """Files of more than some kilobytes cannot be written, as on a disk that has no more room."""
    sweep = make_sweep({"settings": SETTINGS | {"checkpoint_every": 2, "steps": 20}, "grid": FOUR["grid"]})
    seen = carry_out(sweep, tmp_path, Workers(1, setup=(small_files,)))
    failed = [event for event in seen if event.status == "failed"]
    assert len(failed) == 4
    assert all("too large" in event.message or "space" in event.message for event in failed)
    carry_out(sweep, tmp_path)
    assert len(results(tmp_path)) == 4


def small_files() -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


# Kills

SURVIVOR = {
    "settings": SETTINGS | {"steps": 300, "checkpoint_every": 10, "log_every": 1, "batch_size": 32},
    "grid": {"structure": ["dense", "btt"], "seed": [0, 1]},
}


def drive(folder: Path) -> None:
    sweep = make_sweep(SURVIVOR)
    store = Store(folder)
    store.open(sweep.runs, sweep.axes)
    sys.exit(len(do(sweep.runs, store, Workers(2))))


def children(pid: int) -> list[int]:
    """Of a process, and of those in turn."""
    own = Path(f"/proc/{pid}/task/{pid}/children")
    direct = [int(word) for word in own.read_text().split()] if own.exists() else []
    return direct + [grandchild for child in direct for grandchild in children(child)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it finds processes in /proc")
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """Drivers and workers, 20 of them: every run ends as if there had been none, no result is lost or doubled."""
    whole = tmp_path / "whole"
    carry_out(make_sweep(SURVIVOR), whole, Workers(2))
    folder, draw, kills = tmp_path / "killed", random.Random(0), 0
    while True:
        command = [sys.executable, "-m", "tests.experiments.sweeps.test_sweep", str(folder)]
        driver = subprocess.Popen(command, cwd=Path(__file__).parents[3])
        while kills < 20:
            try:
                driver.wait(draw.uniform(0.1, 0.7))
                break
            except subprocess.TimeoutExpired:
                pass
            found = [pid for pid in children(driver.pid) if is_worker(pid)]
            if not found:  # still starting
                continue
            victim = driver.pid if kills % 5 == 4 else draw.choice(found)
            os.kill(victim, signal.SIGKILL)
            kills += 1
        if driver.wait(120) == 0:
            break
    assert kills == 20
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
    seen = carry_out(make_sweep({"settings": SETTINGS}), tmp_path, Workers(1, setup=(die,)))
    assert [event.status for event in seen] == ["lost"] * (attempts.ATTEMPTS - 1) + ["failed"]
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
    carry_out(make_sweep(FOUR), tmp_path, Workers(3, setup=(partial(note_gpu, tmp_path),)))
    found = [path.read_text() for path in tmp_path.glob("gpu-*")]
    assert len(found) == 3
    assert set(found) == seen


def test_a_process_that_died_is_replaced_on_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,8")
    carry_out(make_sweep({"settings": SETTINGS}), tmp_path, Workers(1, setup=(partial(note_gpu, tmp_path), die)))
    assert [path.read_text() for path in tmp_path.glob("gpu-*")][:3] == ["7", "7", "7"]


def test_runs_on_gpus_get_a_process_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(workers, "cpu_count", lambda: 16)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    grid = {"grid": {"seed": list(range(20))}}
    on_cpu, on_gpu = (make_sweep({"settings": SETTINGS | {"device": d}} | grid).runs for d in ("cpu", "cuda"))
    assert (workers.suited(on_cpu), workers.suited(on_gpu), workers.suited(on_gpu[:2])) == (16, 3, 2)


def note_gpu(folder: Path) -> None:
    (folder / f"gpu-{os.getpid()}").write_text(os.environ["CUDA_VISIBLE_DEVICES"])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    drive(Path(sys.argv[1]))
