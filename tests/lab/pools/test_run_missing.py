"""A sweep in its results folder: doing what is missing, refusing what differs, the table of all runs."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.lab.pools.run_sweeps import FOUR, SETTINGS, here, results, run_sweep
from tests.lab.pools.tables import read_table

import einlinear as el
from einlinear.structures import FAMILIES
from einlinear_lab.pools import local
from einlinear_lab.pools.local import LocalPool
from einlinear_lab.pools.pool import Event, Job, run_missing
from einlinear_lab.runs import records, table
from einlinear_lab.runs.data_config import _images
from einlinear_lab.runs.execution import check_runs, execute
from einlinear_lab.runs.records import Result
from einlinear_lab.runs.run import Run
from einlinear_lab.runs.store import HISTORY, Store
from einlinear_lab.runs.table import FILE, RunTable
from einlinear_lab.sweeps.sweep import make_sweep


def test_the_same_sweep_again_does_nothing_and_more_can_be_added(tmp_path: Path) -> None:
    sweep = make_sweep(FOUR)
    seen = run_sweep(sweep, tmp_path, command="first")
    assert sorted(event.run.key for event in seen if event.status == "finished") == sorted(
        run.key for run in sweep.runs
    )
    before = results(tmp_path)
    assert run_sweep(sweep, tmp_path, command="first") == []
    more = make_sweep({**FOUR, "grid": {"structure": ["btt", "low_rank"], "seed": [1]}})
    (added,) = {event.run.key for event in run_sweep(more, tmp_path, command="second")}
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
def test_another_config_is_refused(change: dict[str, Any], difference: str, tmp_path: Path) -> None:
    run_sweep(make_sweep(FOUR), tmp_path)
    other = make_sweep({"config": SETTINGS | change, "grid": FOUR["grid"]})
    with pytest.raises(ValueError, match=f"another config: {difference}.*Name another folder"):
        Store(tmp_path).open(other.runs, other.axes)
    varied = make_sweep({"config": SETTINGS, "grid": FOUR["grid"] | {name: [v] for name, v in change.items()}})
    Store(tmp_path).open(varied.runs, varied.axes)  # said to be varied: nothing is mixed up


def test_options_that_meant_nothing_so_far_are_no_other_config(tmp_path: Path) -> None:
    run_sweep(make_sweep(FOUR), tmp_path)
    mixtures = make_sweep({"config": SETTINGS, "grid": FOUR["grid"] | {"experts": [2]}})
    Store(tmp_path).open(mixtures.runs, mixtures.axes)  # how many of the experts are active: asked for the first time
    run_sweep(mixtures, tmp_path)
    others = make_sweep({"config": SETTINGS | {"active": 1}, "grid": FOUR["grid"] | {"experts": [2]}})
    with pytest.raises(ValueError, match="another config: active was 2, now 1"):
        Store(tmp_path).open(others.runs, others.axes)


def test_other_data_of_the_same_name_is_refused(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0)

    def draw() -> None:
        for label in ("cat", "dog"):
            (tmp_path / "pets" / label).mkdir(parents=True, exist_ok=True)
            for i in range(9):
                image = Image.fromarray(pixels.integers(0, 256, (6, 6), dtype=np.uint8))
                image.save(tmp_path / "pets" / label / f"{i}.png")

    draw()
    sweep = make_sweep({"config": SETTINGS | {"data": str(tmp_path / "pets"), "batch_size": 4}})
    store = Store(tmp_path / "out")
    run_sweep(sweep, store.folder)
    store.open(sweep.runs, sweep.axes, digests=check_runs(sweep.runs))
    draw()
    _images.cache_clear()
    with pytest.raises(ValueError, match=r"holds runs on other data of the name .*pets .*it has changed"):
        store.open(sweep.runs, sweep.axes, digests=check_runs(sweep.runs))


def test_another_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = make_sweep(FOUR)
    run_sweep(sweep, tmp_path)
    monkeypatch.setattr("einlinear_lab.runs.store.code_version", lambda: "9.9+beef")
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
    sweep = make_sweep({"config": SETTINGS | {"structure": "grouped"}})
    run_sweep(sweep, tmp_path)
    Store(tmp_path).open(sweep.runs, sweep.axes)
    el.register_family("grouped", lambda: "(g a), g r a, g e r -> (g e) where g=4, r=3", overwrite=True)
    again = make_sweep({"config": SETTINGS | {"structure": "grouped"}})
    with pytest.raises(ValueError, match="holds runs in which grouped was another structure"):
        Store(tmp_path).open(again.runs, again.axes)


def test_what_varies_the_data_can_be_given_again(tmp_path: Path) -> None:
    sweep = make_sweep({"config": SETTINGS, "grid": {"limit": [200, 300]}})
    run_sweep(sweep, tmp_path)
    Store(tmp_path).open(sweep.runs, sweep.axes, digests=check_runs(sweep.runs))


@pytest.mark.parametrize(
    ("changed", "decides"), [("einlinear/ops/cpu/kernel.cpp", True), ("einlinear_lab/cli/results.py", False)]
)
def test_the_code_is_that_of_the_sources_that_decide_how_a_run_goes(
    changed: str, decides: bool, tmp_path: Path
) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    for package in ("einlinear", "einlinear_lab"):
        shutil.copytree(Path(el.__file__).parents[1] / package, tmp_path / package, ignore=ignored)
    with (tmp_path / changed).open("a") as file:
        file.write("\n")
    command = "from einlinear_lab.runs.records import code_version; print(code_version())"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    here, there = records.code_version(), found.stdout.strip()
    assert (here != there) == decides
    assert here.split("+")[0] == there.split("+")[0] == el.__version__


def test_damaged_results_are_done_again(tmp_path: Path) -> None:
    sweep = make_sweep(FOUR)
    run_sweep(sweep, tmp_path)
    whole = results(tmp_path)
    store = Store(tmp_path)
    victim = store.path(sweep.runs[1])
    (victim / "result.json").write_text((victim / "result.json").read_text()[:30])
    assert len(store.damaged()) == 1
    assert store.missing(sweep.runs) == [sweep.runs[1]]
    run_sweep(sweep, tmp_path)
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
        run_missing(sweep.runs, store, here)


def test_a_run_that_fails_leaves_the_others(tmp_path: Path) -> None:
    sweep = make_sweep({"config": SETTINGS, "grid": {"seed": [0, 1]}})
    seen = run_sweep(sweep, tmp_path, LocalPool(2, setup=(refuse_seed_one,)))
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

    local.execute = refuse  # type: ignore[assignment]


def test_what_cannot_be_built_is_found_before_anything_is_trained() -> None:
    with pytest.raises(ValueError, match="fewer than blocks"):
        check_runs(make_sweep({"config": SETTINGS, "grid": {"structure": ["dense", "monarch(blocks=100)"]}}).runs)
    with pytest.raises(ValueError, match="unknown data 'digit'"):
        check_runs(make_sweep({"config": SETTINGS | {"data": "digit"}}).runs)


def test_a_diverged_run_is_finished(tmp_path: Path) -> None:
    run_sweep(make_sweep({"config": SETTINGS | {"lr": 1e30, "steps": 50}}), tmp_path)
    (row,) = read_table(tmp_path)
    assert row["status"] == "diverged"
    assert row["steps_made"] < row["steps"] == 50
    assert Store(tmp_path).missing(make_sweep({"config": SETTINGS | {"lr": 1e30, "steps": 50}}).runs) == []


def test_the_table_can_be_read_while_runs_are_on(tmp_path: Path) -> None:
    seen = []

    def look(event: Event) -> None:
        seen.append({row["status"] for row in read_table(tmp_path)})

    sweep = make_sweep(FOUR)
    store = Store(tmp_path)
    store.open(sweep.runs, sweep.axes)
    run_missing(sweep.runs, store, LocalPool(1), look)
    assert {"running", "waiting"} <= seen[0]
    assert seen[-1] == {"finished"}
    (tmp_path / FILE).unlink()  # it is made anew
    run_missing(sweep.runs, store, here)
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
    run_missing(sweep.runs, store, LocalPool(1), look)
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
        assert run_missing(sweep.runs, store, here, read_on) == []
    assert len(results(tmp_path)) == 4
    readers[0].close()
    run_missing(sweep.runs, store, here)
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
        run_sweep(make_sweep(FOUR), tmp_path, unlucky)
    rows = read_table(tmp_path)
    assert [row["status"] for row in rows] == 4 * ["finished"]
    assert sum(row["train_loss"] is None for row in rows) == 1


def test_a_full_disk_is_said_and_what_was_done_stays(tmp_path: Path) -> None:
    """Files of more than some kilobytes cannot be written, as on a disk that has no more room."""
    sweep = make_sweep({"config": SETTINGS | {"checkpoint_every": 2, "steps": 20}, "grid": FOUR["grid"]})
    seen = run_sweep(sweep, tmp_path, LocalPool(1, setup=(small_files,)))
    failed = [event for event in seen if event.status == "failed"]
    assert len(failed) == 4
    assert all("too large" in event.message or "space" in event.message for event in failed)
    run_sweep(sweep, tmp_path)
    assert len(results(tmp_path)) == 4


def small_files() -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
