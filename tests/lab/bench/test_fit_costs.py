"""The dispatcher's cost model: whether a fit finds the costs that timings were made of."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.lab.bench.made_up import made_up

from einlinear import ops
from einlinear.ops import cost_model, dispatch
from einlinear_lab.bench import fit_costs, results
from einlinear_lab.bench.cases import BenchConfig, Case, Suite
from einlinear_lab.bench.machine import this_machine
from einlinear_lab.bench.results import Bench, BenchResult
from einlinear_lab.bench.variants import DENSE

ROOT = Path(__file__).parents[3]
SUITE = Suite(
    structures=("btt", "btt(rank=2)", "monarch(blocks=4)", "low_rank(rank={d/8})", "tt(rank=4, cores=3)"),
    sizes=((256, 256), (1024, 512), (1024, 1024)),
    tokens=(1, 16, 64, 1024),
)
# Microseconds: of a call, a step, a million MACs, activations, weights, and weights beyond the cache.
FORWARD = {
    "dense": (3.0, 0.0, 12.0, 7.0, 170.0, 0.0),
    "reference": (40.0, 50.0, 15.0, 750.0, 250.0, 2.0),
    "batched": (70.0, 9.0, 14.0, 450.0, 300.0, 0.25),
    "cpu": (5.0, 20.0, 10.0, 200.0, 100.0, 1.25),
}
COSTS = {"forward": FORWARD, "train": {name: tuple(3 * c for c in own) for name, own in FORWARD.items()}}


def timed(case: Case) -> BenchResult:
    """A result whose times are those of the cost model."""
    by_backend, (structure,) = COSTS["train" if case.mode == "train" else "forward"], case.build()
    amounts = {name: cost_model.amounts(name, structure, case.tokens) for name in by_backend}
    us = {name: sum(c * a for c, a in zip(by_backend[name], amounts[name], strict=True)) for name in by_backend}
    return made_up(case, **{DENSE if name == "dense" else name: us[name] / 1e6 for name in by_backend})


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(this_machine("cpu"), BenchConfig(), results=tuple(map(timed, SUITE.cases())))


@pytest.fixture
def other_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file of costs to be written over."""
    monkeypatch.setattr(cost_model, "COSTS_FILE", tmp_path / "costs.json")
    monkeypatch.setattr(cost_model, "cache_folder", lambda: tmp_path / "cache")
    dispatch.forget()
    yield tmp_path / "costs.json"
    dispatch.forget()


def test_a_fit_finds_the_costs_that_timings_were_made_of(bench: Bench) -> None:
    found = fit_costs.fit([bench])
    assert found.keys() == COSTS.keys()
    for mode, by_backend in COSTS.items():
        assert found[mode].keys() == by_backend.keys()
        for name, coefficients in by_backend.items():
            fitted = found[mode][name]
            if name == "dense":  # one step a call: only their sum can be told
                fitted = [sum(fitted[:2]), 0.0, *fitted[2:]]
            assert fitted == pytest.approx(coefficients, rel=1e-3)


def test_what_a_choice_costs(bench: Bench) -> None:
    with ops.backend("batched"):
        found = fit_costs.losses([bench])
    assert len(found) == len(bench.results)
    assert [loss for loss, _ in found] == sorted((loss for loss, _ in found), reverse=True)
    by_case = {case: loss for loss, case in found}
    for result in bench.results:
        batched, cpu, reference = (result.of(name).seconds.median for name in ("batched", "cpu", "reference"))
        assert by_case[result.case] == pytest.approx(batched / min(batched, cpu, reference))


def test_a_run_without_an_executor_is_refused(bench: Bench) -> None:
    decoding = tuple(result for result in bench.results if result.case.mode == "decode")
    with pytest.raises(ValueError, match=r"no measurements .* of dense \(train\), reference \(train\)"):
        fit_costs.fit([dataclasses.replace(bench, results=decoding)])


def test_written_and_checked(
    bench: Bench, other_costs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.json"
    results.write(bench, file)
    assert fit_costs.main([str(file)]) == 0
    out = capsys.readouterr().out
    assert f"{len(bench.results)} cases, shipped coefficients; chosen within 10 % of the fastest: " in out
    assert cost_model.read_costs() == cost_model.costs().coefficients == fit_costs.fit([results.read(file)])
    assert fit_costs.main(["--check"]) == 0

    content = json.loads(other_costs.read_text())
    content["train"]["batched"][2] *= 1.1
    other_costs.write_text(json.dumps(content))
    capsys.readouterr()
    assert fit_costs.main(["--check"]) == 1
    assert "costs.json is not the fit of these files: batched (train)" in capsys.readouterr().out
    assert json.loads(other_costs.read_text()) == content

    file.unlink()
    with pytest.raises(SystemExit, match="2"):
        fit_costs.main(["--check"])
    assert "bench.json does not exist" in capsys.readouterr().err


def test_the_costs_are_the_fit_of_the_measurements_that_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert fit_costs.main(["--check"]) == 0
