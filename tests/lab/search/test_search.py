"""Searches: candidates that are trained once, whatever dies, whoever else is at work, in every kind of storage."""

from __future__ import annotations

import os
import queue
import random
import signal
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from optuna.trial import TrialState
from tests.lab.pools.test_local import children, is_worker, started
from tests.lab.search.postgres import server

from einlinear_lab.models.config import Shape
from einlinear_lab.pools.local import LocalPool, attempt
from einlinear_lab.pools.pool import Event, Job
from einlinear_lab.runs.run import Run
from einlinear_lab.runs.store import Store
from einlinear_lab.search.config import STARTUP_TRIALS, SearchConfig
from einlinear_lab.search.leaders import alongside, read_leaders, split_leaders, unseen_seed
from einlinear_lab.search.matching import with_structures
from einlinear_lab.search.search import Search, base_run, rungs_of
from einlinear_lab.search.space import LITERATURE
from einlinear_lab.search.study import SAME_AS
from einlinear_lab.sweeps import compare
from einlinear_lab.sweeps.compare import plan

OPTIONS: dict[str, Any] = {"data": "digits", "depth": 1, "batch_size": 128, "steps": 8, "log_every": 1, "budget": 8_000}
SURVIVOR = OPTIONS | {"steps": 150, "checkpoint_every": 10, "prune": False, "sampler": "random", "trials": 6}


@pytest.fixture(autouse=True, scope="module")
def unsynced() -> Iterator[None]:
    """SQLite does not wait for the disk, as no test cuts the power."""

    def connected(connection: object, _: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", connected)
    yield
    sqlalchemy.event.remove(sqlalchemy.Engine, "connect", connected)


def here(jobs: Iterable[Job]) -> Iterator[Event]:
    """A pool of this process alone, which says how far runs are."""
    for run, folder in jobs:
        said: list[tuple[int, int, float]] = []
        outcome = attempt(run.config, folder, lambda *step, said=said: said.append(step))  # type: ignore[misc]
        yield from (Event(run, "running", *step) for step in said[-1:])
        yield Event(run, **outcome)


def step_by_step(jobs: Iterable[Job]) -> Iterator[Event]:
    """A pool whose runs wait after every step until the driver has heard of it."""
    for run, folder in jobs:
        events: queue.Queue[Event] = queue.Queue()

        def said(step: int, steps: int, loss: float, run: Run = run, events: queue.Queue[Event] = events) -> None:
            events.put(Event(run, "running", step, steps, loss))
            events.join()

        with ThreadPoolExecutor(1) as thread:
            outcome = thread.submit(attempt, run.config, folder, said)
            while not (outcome.done() and events.empty()):
                with suppress(queue.Empty):
                    yield events.get(timeout=0.1)
                    events.task_done()
            yield Event(run, **outcome.result())


def configure(**options: Any) -> SearchConfig:
    """The config of a search from its options and those of its runs."""
    own = {name: options.pop(name) for name in SearchConfig.__dataclass_fields__.keys() & options.keys()}
    return SearchConfig(options=options, **own)


def search(folder: Path, storage: str | None = None, **options: Any) -> Search:
    return Search(configure(**OPTIONS | options)).open(Store(folder), storage)


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp"])
def test_candidates_are_different_and_cost_the_same(tmp_path: Path, sampler: str) -> None:
    found = search(tmp_path, sampler=sampler, trials=12)
    assert found.run_trials(here) == []
    tried = found.study.trained()
    assert len(tried) == 12 == len({own.architecture.signature for own in tried}) == len({own.run.key for own in tried})
    for own in tried:
        record = next(record for record in Store(tmp_path).records() if record.run.key == own.run.key)
        assert record.result is not None
        assert record.result.macs == own.architecture.macs
        assert abs(own.architecture.macs / 8_000 - 1) <= 0.05
        assert own.value == record.result.metrics[found.manifest.metric or ""]
    best = [leader.record for leader in read_leaders(tmp_path, 3)]
    assert [record.result.metrics[record.metric] for record in best if record.result] == sorted(
        own.value or 0 for own in tried
    )[:3]
    others, found_best = split_leaders(("dense", f"from-study:{tmp_path}"))
    assert others == ("dense",)
    assert [own.record.run for own in found_best] == [record.run for record in best]
    dense, *beside = alongside(found_best, others, best[0].run.config)
    assert beside == [{"structure": r.run.model.structure, "width": r.run.model.width} for r in best]
    assert dense["structure"] == "dense"
    macs = with_structures(best[0].run.model, dense["width"], {"structure": "dense"}).build(Shape(64, 10)).macs
    assert abs(macs / 8_000 - 1) <= 0.05


def test_diverged_runs_count_as_the_worst(tmp_path: Path) -> None:
    found = search(tmp_path, trials=10, sampler="gp", lr=1e12)
    assert found.run_trials(here) == []
    assert [own.value for own in found.study.trained()] == 10 * [float("inf")]


def test_time_may_count(tmp_path: Path) -> None:
    found = search(tmp_path, trials=6, sampler="random", time_weight=1.0, metric="test_loss")
    found.run_trials(here)
    results = {record.run.key: record.result for record in Store(tmp_path).records()}
    for own in found.study.trained():
        result = results[own.run.key]
        assert result is not None
        assert result.step_seconds is not None
        assert own.value == result.metrics["test_loss"] * result.step_seconds
    best = read_leaders(tmp_path, 6)
    assert [leader.record.run.key for leader in best] == [
        own.run.key for own in sorted(found.study.trained(), key=lambda own: own.value or 0)
    ]
    with pytest.raises(ValueError, match=r"time_weight was 1\.0, now 0\.5"):
        search(tmp_path, trials=6, sampler="random", time_weight=0.5, metric="test_loss")


def test_roles_have_structures_of_their_own(tmp_path: Path) -> None:
    found = search(tmp_path, trials=10, sampler="gp", roles=("up", "down"))
    found.run_trials(here)
    tried = found.study.trained()
    assert len({own.architecture.signature for own in tried}) == 10
    for own in tried:
        model = own.run.model
        assert own.architecture.specs == {
            "structure": model.structure,
            "up_structure": getattr(model, "up_structure"),  # noqa: B009
            "down_structure": getattr(model, "down_structure"),  # noqa: B009
        }
    _, (best, *_) = split_leaders((f"from-study:{tmp_path}",))
    assert best.model.keys() == {"structure", "width", "up_structure", "down_structure"}
    runs = plan(compare.configure(structures=(), sized=(best.model,), seeds=2, **best.shared)).runs
    assert [run.model for run in runs] == [best.record.run.model] * 2


def test_searches_that_are_not_alike_are_not_confirmed_together(tmp_path: Path) -> None:
    search(tmp_path / "one", trials=1).run_trials(here)
    search(tmp_path / "two", trials=1, steps=9).run_trials(here)
    with pytest.raises(ValueError, match="searches of different configs cannot be compared: steps was 8, now 9"):
        split_leaders((f"from-study:{tmp_path / 'one'}", f"from-study:{tmp_path / 'two'}"))


def test_searches_that_differ_in_what_changes_nothing_are(tmp_path: Path) -> None:
    for name, prune in (("one", True), ("two", False)):
        search(tmp_path / name, trials=1, prune=prune, log_every=8).run_trials(here)
    _, found = split_leaders((f"from-study:{tmp_path / 'one'}", f"from-study:{tmp_path / 'two'}"))
    assert found[0].shared["log_every"] != found[1].shared["log_every"]
    assert unseen_seed(found) == 1


def test_it_goes_on_with_more_trials_and_refuses_other_settings(tmp_path: Path) -> None:
    search(tmp_path, trials=3).run_trials(here)
    before = {own.number: own for own in search(tmp_path, trials=3).study.trained()}
    again = search(tmp_path, trials=5)
    again.run_trials(here)
    after = {own.number: own for own in again.study.trained()}
    assert len(after) == 5
    assert all(after[number] == own for number, own in before.items())
    with pytest.raises(ValueError, match=r"budget was 8000, now 9000\. Name another folder"):
        search(tmp_path, trials=5, budget=9_000)
    with pytest.raises(ValueError, match="holds results of another config: lr was"):
        search(tmp_path, trials=5, lr=0.1)


@pytest.mark.parametrize("sampler", ["gp", "tpe", "random"])
def test_structures_of_the_literature_come_first(tmp_path: Path, sampler: str) -> None:
    wanted = [theta.spec for theta in LITERATURE.values()]

    def tried(folder: str, **options: Any) -> list[str]:
        found = search(tmp_path / folder, sampler=sampler, **options)
        found.run_trials(here)
        return [own.architecture.spec for own in found.study.trained()]

    assert tried("known", trials=2) == (wanted[:2] if sampler != "random" else tried("chance", trials=2))
    assert tried("known", trials=4)[:4] == (wanted[:4] if sampler != "random" else tried("chance", trials=4))
    assert not {*tried("unknown", trials=4, warm_start=False)} & {*wanted}


def test_searches_of_different_seeds_have_nothing_in_common(tmp_path: Path) -> None:
    found = [search(tmp_path / str(seed), trials=5, sampler="random", seed=seed) for seed in (0, 1)]
    for own in found:
        own.run_trials(here)
    one, other = ({tried.architecture.signature for tried in own.study.trained()} for own in found)
    assert not one & other


def test_a_candidate_of_the_same_sizes_is_not_trained_again(tmp_path: Path) -> None:
    found = search(tmp_path, trials=1, sampler="random")
    found.run_trials(here)
    (first,) = found.study.optuna.get_trials()
    found.study.optuna.enqueue_trial(first.params)
    more = search(tmp_path, trials=2, sampler="random")
    more.run_trials(here)
    same = [trial for trial in more.study.optuna.get_trials() if SAME_AS in trial.user_attrs]
    assert [trial.user_attrs[SAME_AS] for trial in same] == [first.number]
    assert [trial.value for trial in same] == [first.value]
    assert len(Store(tmp_path).records()) == 2


@pytest.mark.parametrize(("steps", "abandoned"), [(38, 0), (40, 8)])
def test_trials_that_are_behind_are_pruned(tmp_path: Path, steps: int, abandoned: int) -> None:
    options = {"steps": steps, "sampler": "random"}
    search(tmp_path, trials=16 - abandoned, **options).run_trials(step_by_step)
    found = search(tmp_path, trials=16, **options)
    gone = search(tmp_path, trials=16, **options)  # a driver that chooses runs and dies, which others take up
    assert all(gone.next_run() for _ in range(abandoned))
    found.run_trials(step_by_step)
    tried = found.study.trained()
    assert {own.state for own in tried} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert all(own.value is not None for own in tried[:STARTUP_TRIALS])  # what the others are judged by
    assert any("completed_rung_1" in trial.system_attrs for trial in found.study.optuna.get_trials())  # Optuna's name
    finished = {record.run.key for record in Store(tmp_path).records() if record.result}
    assert finished == {own.run.key for own in tried if own.value is not None}


def test_a_folder_may_be_renamed(tmp_path: Path) -> None:
    search(tmp_path / "one", trials=2).run_trials(here)
    (tmp_path / "one").rename(tmp_path / "two")
    assert len(search(tmp_path / "two", trials=2).study.trained()) == 2
    with pytest.raises(ValueError, match="study was 'one', now 'three'"):
        Search(configure(**OPTIONS)).open(Store(tmp_path / "two"), name="three")


def test_a_run_that_fails_says_so_and_the_search_goes_on(tmp_path: Path) -> None:
    def failing(jobs: Iterable[Job]) -> Iterator[Event]:
        for number, (run, folder) in enumerate(jobs):
            if number == 1:
                yield Event(run, "failed", message="it broke")
            else:
                yield from here([(run, folder)])

    found = search(tmp_path, trials=4)
    failed = found.run_trials(failing)
    assert [event.message for event in failed] == ["it broke"]
    assert len(found.study.trained()) == 4  # another one was tried for it


def test_a_run_that_fails_as_the_last_is_made_up_for(tmp_path: Path) -> None:
    broken: list[Run] = []

    def failing(jobs: Iterable[Job]) -> Iterator[Event]:
        *others, (run, folder) = jobs  # all are handed out before the first one ends
        yield from here(others)
        if broken:
            yield from here([(run, folder)])
        else:
            broken.append(run)
            yield Event(run, "failed", message="it broke")

    found = search(tmp_path, trials=4)
    assert [event.run for event in found.run_trials(failing)] == broken
    assert len([own for own in found.study.trained() if own.value is not None]) == 4


def test_if_all_runs_fail_it_ends(tmp_path: Path) -> None:
    def failing(jobs: Iterable[Job]) -> Iterator[Event]:
        for run, _ in jobs:
            yield Event(run, "failed", message="it broke")

    assert len(search(tmp_path, trials=4).run_trials(failing)) == 4
    again = search(tmp_path, trials=4)  # what made them fail may have been mended
    assert not again.run_trials(here)
    assert [own.architecture.spec for own in again.study.trained()] == [
        theta.spec for theta in [*LITERATURE.values()][:4]
    ]


def test_time_is_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def failing(jobs: Iterable[Job]) -> Iterator[Event]:
        for run, _ in jobs:
            now[0] += 1800
            yield Event(run, "failed", message="it broke")

    assert len(search(tmp_path, trials=40, hours=2).run_trials(failing)) == 5


def test_a_journal_is_shared_by_those_who_append_to_it(tmp_path: Path) -> None:
    one, other = (search(tmp_path, "journal", trials=4) for _ in range(2))
    with suppress(KeyboardInterrupt):
        one.run_trials(interrupted)
    assert other.run_trials(here) == []
    tried = other.study.trained()
    assert len(tried) == len(Store(tmp_path).records()) == 4
    assert {own.state for own in tried} == {TrialState.COMPLETE}
    assert len({own.architecture.signature for own in tried}) == 4


def interrupted(jobs: Iterable[Job]) -> Iterator[Event]:
    """A pool whose driver is interrupted after two runs."""
    for number, event in enumerate(here(jobs)):
        if event.status == "finished" and number > 2:
            raise KeyboardInterrupt
        yield event


def test_a_study_belongs_to_one_folder(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'both.sqlite'}"
    search(tmp_path / "one", storage, trials=1).run_trials(here)
    with pytest.raises(ValueError, match="has another config: results folder was"):
        Search(configure(**OPTIONS)).open(Store(tmp_path / "two"), storage, name="one")
    with pytest.raises(ValueError, match="holds another search: storage was 'database', now 'journal'"):
        search(tmp_path / "one", "journal", trials=1)
    with pytest.raises(ValueError, match="holds another search: axes was"):
        search(tmp_path / "one", storage, trials=1, roles=("up",))
    with pytest.raises(ValueError, match="storage must be journal or the URL of a database, not 'nonsense'"):
        search(tmp_path / "three", "nonsense", trials=1)
    with pytest.raises(ValueError, match=r"the database .*:\*\*\*@localhost:1/x does not answer"):
        search(tmp_path / "three", "postgresql+psycopg://me:secret@localhost:1/x", trials=1)
    assert not (tmp_path / "three").exists()


def test_two_that_choose_at_random_choose_differently(tmp_path: Path) -> None:
    drivers = [search(tmp_path, trials=30, sampler="random", budget=20_000) for _ in range(2)]
    runs = [driver.next_run() for _ in range(8) for driver in drivers]
    assert len({run.key for run in runs if run}) == 16
    assert len(drivers[0].study.optuna.get_trials()) < 40  # hardly any was proposed in vain


def test_losses_are_logged_often_enough_to_be_pruned() -> None:
    for steps in (1, 2, 30, 60, 100, 300):
        base = Search(configure(**{**OPTIONS, "steps": steps, "log_every": 10})).base
        logged = [step for step in range(1, steps + 1) if step % base.training.log_every == 0]
        for rung in rungs_of(base):
            assert rung > steps or any(rung - round(0.2 * rung) <= step <= rung for step in logged), (steps, rung)


def test_heads_of_a_gpt() -> None:
    def heads(**options: Any) -> tuple[Any, Any]:
        model = base_run(configure(budget=1, model="gpt", steps=4, data="x", **options)).model
        return getattr(model, "heads"), getattr(model, "d_head")  # noqa: B009

    assert heads() == (4, None)
    assert heads(d_head=32) == (None, 32)
    assert heads(heads=2) == (2, None)


def test_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("einlinear_lab.search.search._ALL", 50)
    found = search(tmp_path, families=("dyad",), trials=50, sampler="random", steps=1)
    found.run_trials(here)
    tried = found.study.trained()
    # three variants of 2, 4, 5, 6, 7 and 8 blocks: with 3 none costs the budget
    assert len({own.architecture.spec for own in tried}) == len(tried) == 18


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "grid"}, "sampler must be gp, tpe, random, not 'grid'"),
        ({"families": ("monarch",)}, "families must be some of einsum, btt3, blast, dyad, not monarch"),
        ({"roles": ("head",)}, "roles must be some of attention_in, attention_out, up, down, not head"),
        ({"roles": ("attention_in",)}, "model=mlp has no attention_in_structure"),
        ({"roles": ("up",), "up_structure": "btt"}, "up_structure cannot be set: the search chooses them"),
        ({"trials": 0}, "trials must be at least 1"),
        ({"hours": 0}, "hours must be positive"),
        ({"structure": "btt"}, "structure cannot be set: the search chooses them"),
        ({"time_weight": -1}, "time_weight must be at least 0, not -1"),
        ({"metric": "beauty"}, "metric must be one of"),
        ({"budget": 10}, "none of 20 structures drawn at random has a model of the budget: no einsum"),
        ({"experts": 4}, "a search has no mixtures of experts"),
    ],
)
def test_mistakes(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def drive(folder: Path, storage: str | None) -> None:
    sys.exit(len(Search(configure(**SURVIVOR)).open(Store(folder), storage).run_trials(LocalPool(2))))


def check(folder: Path, storage: str | None) -> None:
    """Every candidate was trained once, from the first step to the last, and all are in the study."""
    study = Search(configure(**SURVIVOR)).open(Store(folder), storage).study
    tried = study.trained()
    study.close()
    assert len(tried) == SURVIVOR["trials"]
    assert {own.state for own in tried} == {TrialState.COMPLETE}
    assert len({own.architecture.signature for own in tried}) == len(tried)
    records = {record.run.key: record for record in Store(folder).records()}
    assert records.keys() == {own.run.key for own in tried}
    for own in tried:
        result = records[own.run.key].result
        assert result is not None
        assert result.steps == SURVIVOR["steps"]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it finds processes in /proc")
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_two_drivers_killed_at_random_moments(tmp_path: Path, kind: str) -> None:
    folder, draw, most = tmp_path / "search", random.Random(0), 3
    with server(tmp_path) if kind == "postgresql" else nullcontext() as storage:
        drivers = [started(drive, folder, storage), started(drive, folder, storage)]
        kills = 0
        while kills < most:
            time.sleep(draw.uniform(0.3, 1.0))
            alive = [driver for driver in drivers if driver.is_alive()]
            workers = [pid for driver in alive for pid in children(driver.pid or 0) if is_worker(pid)]
            if not workers:
                if not alive:
                    break
                continue
            if kills % 3 == 2:
                victim = draw.choice(alive)
                victim.kill()
                victim.join()
                drivers.remove(victim)
                drivers.append(started(drive, folder, storage))
            else:
                os.kill(draw.choice(workers), signal.SIGKILL)
            kills += 1
        assert kills >= 3
        for driver in drivers:
            driver.join(300)
            driver.kill()  # one that does not end
        assert [driver.exitcode for driver in drivers] == [0, 0]
        # what a driver left behind when the others had ended
        assert Search(configure(**SURVIVOR)).open(Store(folder), storage).run_trials(LocalPool(2)) == []
        check(folder, storage)
