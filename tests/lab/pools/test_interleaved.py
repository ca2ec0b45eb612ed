"""Runs that take turns: the same results as alone, seconds that can be compared, and interruptions."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lab.pools.run_sweeps import FOUR, SETTINGS, results, run_sweep
from torch import Tensor

from einlinear_lab.data import Batches
from einlinear_lab.pools.interleaved import CHECKPOINTS, TURNS, InterleavedPool
from einlinear_lab.pools.pool import Event
from einlinear_lab.runs.records import METRICS
from einlinear_lab.runs.run import Run
from einlinear_lab.runs.store import Store
from einlinear_lab.sweeps.sweep import make_sweep
from einlinear_lab.training import loop, metrics
from einlinear_lab.training.tasks import Classification

LONG = 2 * TURNS + 7
SWEEP = FOUR | {"config": SETTINGS | {"steps": LONG, "log_every": 1, "evaluate_every": 50}}


def test_the_results_are_those_of_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = Classification.loss

    def noisy(self: Classification, model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """A run that draws random numbers, as with dropout."""
        return loss(self, model, (batch[0] + 0.1 * torch.randn(batch[0].shape), batch[1]))

    monkeypatch.setattr(Classification, "loss", noisy)
    run_sweep(make_sweep(SWEEP), tmp_path / "alone")
    threads = torch.get_num_threads()
    seen = run_sweep(make_sweep(SWEEP), tmp_path / "turns", InterleavedPool())
    assert torch.get_num_threads() == threads
    assert results(tmp_path / "turns") == results(tmp_path / "alone")
    assert [event.status for event in seen].count("finished") == 4
    turns = [(event.run.model.structure, event.run.seed) for event in seen]
    rounds = LONG // 2 + 1
    assert turns == [("dense", 0), ("btt", 0)] * rounds + [("dense", 1), ("btt", 1)] * rounds


def test_a_slow_machine_slows_all_runs_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that runs faster and faster: seconds of a step are its number in the process."""
    calls = itertools.count()
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(calls) ** 2))
    sweep = make_sweep({**SWEEP, "grid": {"structure": ["dense", "btt"], "lr": [1e-3, 3e-3]}})
    run_sweep(sweep, tmp_path / "alone")
    calls = itertools.count()
    run_sweep(sweep, tmp_path / "turns", InterleavedPool())
    longest = {name: max(seconds(tmp_path / name)) / min(seconds(tmp_path / name)) for name in ("alone", "turns")}
    assert longest["alone"] > 6
    assert longest["turns"] < 1.1


def seconds(folder: Path) -> list[float]:
    """The training seconds of all runs."""
    return [metrics.read(record.folder / METRICS)[-1]["training_seconds"] for record in Store(folder).records()]


def test_interrupted_runs_resume_with_their_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_sweep(make_sweep(SWEEP), tmp_path / "whole", InterleavedPool())
    clock = itertools.count()  # a second passes whenever it is looked at
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(clock)))
    pool = InterleavedPool()

    def impatient(jobs: Any) -> Iterator[Event]:
        for made, event in enumerate(pool(jobs)):
            if made == 2 * TURNS // 2:
                raise KeyboardInterrupt
            yield event

    with pytest.raises(KeyboardInterrupt):
        run_sweep(make_sweep(SWEEP), tmp_path / "parts", impatient)
    begun = Store(tmp_path / "parts").records()
    assert len(begun) == 2
    assert not any(record.result for record in begun)
    every = LONG // CHECKPOINTS
    for record in begun:
        saved = sorted(path.name for path in (record.folder / "checkpoints").iterdir())
        assert saved[-1] == f"step-{50 // every * every:08}"
    run_sweep(make_sweep(SWEEP), tmp_path / "parts", InterleavedPool())
    assert results(tmp_path / "parts") == results(tmp_path / "whole")
    for record in Store(tmp_path / "parts").records():
        lines = [json.loads(line) for line in (record.folder / METRICS).read_text().splitlines()]
        assert {line["step"] for line in lines} == {*range(1, LONG + 1)}
        assert all(line["training_seconds"] == line["step"] for line in lines)


def test_a_run_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = Classification.loss

    def refusing(self: Classification, model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if self.batches.seed == wrong:
            raise error
        return loss(self, model, batch)

    monkeypatch.setattr(Classification, "loss", refusing)
    sweep = make_sweep({**SWEEP, "grid": {"seed": [0, 1]}})
    for wrong, error in ((0, ValueError("not this one")), (1, RuntimeError("a bug"))):
        seen = run_sweep(sweep, tmp_path / str(wrong), InterleavedPool())
        ends = {event.run.seed: event for event in seen if event.status != "running"}
        assert ends[1 - wrong].status == "finished"
        assert ends[wrong].status == "failed"
        assert ends[wrong].message.splitlines()[-1].endswith(str(error))
        assert ("Traceback" in ends[wrong].message) == isinstance(error, RuntimeError)


def test_an_interrupt_frees_the_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the error is still there, with all frames. The user's interval of checkpoints stays."""
    config = SETTINGS | {"steps": 20, "checkpoint_every": 7}
    jobs = [(Run.of(config | {"lr": lr}), tmp_path / lr) for lr in ("1e-3", "3e-3")]
    batch = Batches.batch
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "batch", lambda self, step: batch(self, step) if step < 10 else stop())
        with pytest.raises(KeyboardInterrupt) as interruption:
            list(InterleavedPool()(jobs))
    for _, folder in jobs:
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000007"]
    assert [event.status for event in InterleavedPool()(jobs)][-2:] == ["finished"] * 2
    assert interruption.traceback


def stop() -> Any:
    raise KeyboardInterrupt
