"""The clock, the memory, the traffic, the suites."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager

import pytest
import torch

import einlinear as el
from einlinear import ops
from einlinear_lab.bench import run, timing
from einlinear_lab.bench.cases import SUITES, BenchConfig, Case, choose, estimate_traffic
from einlinear_lab.bench.machine import Roofline, this_machine
from einlinear_lab.bench.memory import peak_bytes
from einlinear_lab.bench.timing import Spread, interleave, spread
from einlinear_lab.bench.variants import (
    COPYING,
    DENSE,
    OURS,
    RECOMPUTING,
    SAVING,
    TWO,
    make_variants,
    make_workload,
)


def test_calls_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    found = interleave(calls, "cpu", budget=0)
    assert {name: len(seconds) for name, seconds in found.items()} == dict.fromkeys("abc", timing.MIN_RUNS)
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 1


def test_the_budget_is_used() -> None:
    assert len(interleave({"a": lambda: None}, "cpu", budget=0.05)["a"]) > 100


def test_spreads() -> None:
    assert spread([7.0]) == Spread(7, 7, 7)
    assert Spread(2, 1, 3).apart(Spread(5, 4, 6))
    assert not Spread(2, 1, 3).apart(Spread(3, 2, 4))


def test_peak_memory_is_exact() -> None:
    def call() -> torch.Tensor:
        first = torch.empty(1000)
        second = torch.empty(5000)
        del first
        return torch.empty(10) + len(second)

    assert peak_bytes(call, "cpu") == 4 * 6000


def test_peak_memory_of_a_training_step() -> None:
    p = make_workload(Case("btt", 64, 64, 100, "train"))
    calls = {v.name: lambda v=v: p.step(v) for v in [*make_variants(p)[0], p.dense]}
    peaks = {name: peak_bytes(call, "cpu") for name, call in calls.items()}
    y = x = 4 * 100 * 64
    assert peaks[DENSE] == y + x + 4 * 64 * 64
    assert peaks[OURS] >= y + x + 4 * p.structures[0].params


def test_recomputing_is_switched_on_and_off(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    backend = ops.backend

    def recording(*, recompute: bool) -> AbstractContextManager[None]:
        asked.append(recompute)
        return backend(recompute=recompute)

    monkeypatch.setattr(ops, "backend", recording)
    p = make_workload(Case("btt", 64, 64, 32, "train"))
    for name in (SAVING, RECOMPUTING):
        p.step(next(variant for variant in make_variants(p)[0] if variant.name == name))
    assert asked == [False, True]


def test_ratios_are_those_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {DENSE: [4.0, 8.0, 1.0], OURS: [2.0, 2.0, 1.0], COPYING: [6.0, 6.0, 6.0]}
    monkeypatch.setattr(run, "interleave", lambda *_: seconds)
    result = run.measure(Case("btt", 64, 64, 32, "forward"), BenchConfig(), Roofline(2e6, 1e9))
    ours = result.of(OURS)
    assert ours is not None
    assert (ours.runs, ours.seconds) == (3, spread([2, 2, 1]))
    assert ours.speedup == spread([2, 4, 1])
    assert ours.over_copying == spread([3, 3, 6])
    assert result.roofline_seconds == 32 * 64 * 8 * 2 / 1e6
    training = run.measure(Case("btt", 64, 64, 32, "train"), BenchConfig(), Roofline(2e6, 1e9))
    assert training.roofline_seconds == 3 * result.roofline_seconds
    assert ours.peak_bytes is None
    assert all(m.peak_bytes for m in training.measurements if m.seconds)


def test_traffic_against_numbers_worked_out_here() -> None:
    s = el.structure("btt(rank=2)", 64, 64)  # 8 · 8 on both sides, an intermediate of 8 · 8 · 2 features
    case = Case(s.spec, 64, 64, 10, "forward")
    x = y = 10 * 64
    z, factors = 10 * 128, 2 * 8 * 8 * 8 * 2
    forward = estimate_traffic(case, s)
    assert (forward.least, forward.total, forward.intermediates) == (
        4 * (x + y + factors),
        4 * (x + y + factors + 2 * z),
        4 * z,
    )
    training = estimate_traffic(Case(s.spec, 64, 64, 10, "train", "bfloat16"), s)
    assert training.least == 2 * (3 * x + 2 * y + 3 * factors)
    assert training.total == training.least + 2 * 6 * z


def test_the_slower_of_arithmetic_and_memory_is_the_roof() -> None:
    assert Roofline(flops=100, bandwidth=10).seconds(flops=200, moved=5) == 2
    assert Roofline(flops=100, bandwidth=10).seconds(flops=200, moved=50) == 5


def test_the_machine_is_described() -> None:
    machine = this_machine("cpu")
    assert machine.threads == torch.get_num_threads()
    assert torch.__version__ in str(machine)
    assert machine == this_machine("cpu")


def test_the_suites_are_what_they_say() -> None:
    standard = SUITES["standard"].cases()
    assert len(standard) == 8 * 6 * (2 + 2 * 2)
    assert {case.mode for case in standard if case.tokens <= 16} == {"decode"}
    assert {case.mode for case in standard if case.tokens > 16} == {"forward", "train"}
    ranks = {case.size: case.structure for case in standard if case.structure.startswith("low_rank")}
    assert ranks["4096 → 4096"] == "low_rank(rank=512)"
    assert ranks["1024 → 4096"] == "low_rank(rank=128)"
    assert all(case.device == "cuda" and case.dtype == "bfloat16" for case in SUITES["gpu"].cases())
    assert {case.mode for case in standard if case.cold} == {"decode"}
    assert not any(case.cold for case in SUITES["gpu"].cases())


def test_the_suite_of_what_users_have() -> None:
    cases = SUITES["cpu"].cases()
    assert {case.dtype for case in cases} == {"float32", "bfloat16", "float16"}
    assert {case.tokens for case in cases if case.in_features == 4096} == {1, 8, 1024}
    assert {case.tokens for case in cases if case.in_features < 4096} == {1, 8, 2048}
    specs = {d: {case.structure for case in cases if case.in_features == d} for d in (64, 256)}
    # 16 blocks of 4 features would have no rank
    assert specs[256] - specs[64] == {"monarch(blocks=16)", "low_rank(rank=32)"}
    asked = choose("cpu", tokens=(2048,), sizes=((4096, 4096),), cold=False)
    assert {case.tokens for case in asked.cases()} == {2048}
    assert not any(case.cold for case in choose("cpu", cold=False).cases())


def test_slow_calls_run_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PATIENCE", 0.01)
    assert len(interleave({"a": lambda: time.sleep(0.02)}, "cpu", budget=0)["a"]) == 1


def test_two_dense_layers_are_the_low_rank() -> None:
    by_spec = {}
    for spec in ("low_rank(rank=4)", "btt", "kronecker"):
        p = make_workload(Case(spec, 32, 48, 3, "decode", bias=True))
        by_spec[spec] = {variant.name: variant.forward for variant in make_variants(p)[0]}
        if spec.startswith("low_rank"):
            torch.testing.assert_close(by_spec[spec][TWO](p.x), by_spec[spec][OURS](p.x))
    assert [spec for spec, variants in by_spec.items() if TWO in variants] == ["low_rank(rank=4)"]


def test_a_suite_can_be_changed() -> None:
    suite = choose("standard", structures=("dyad",), sizes=((64, 32),), tokens=(32,), modes=("train",), budget=0.5)
    assert suite.cases() == [Case("dyad", 64, 32, 32, "train")]
    assert suite.config.budget == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structures": ("bttt",)}, "Did you mean 'btt'"),
        ({"modes": ("backward",)}, "unknown pass 'backward'"),
        ({"dtypes": ("float8",)}, "unknown dtype 'float8'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"tokens": (0,)}, "must be positive"),
        ({"tokens": (4,), "modes": ("train",)}, "nothing to measure"),
        ({"structures": ("monarch(blocks=7)",), "sizes": ((8, 8),)}, "take at most 2 blocks"),
    ],
)
def test_what_cannot_be_measured_is_said(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose("quick", **options).cases()


def test_an_unknown_suite() -> None:
    with pytest.raises(ValueError, match="choose from quick, small, standard, cpu, blocks, calibration, gpu"):
        choose("slow")
