"""The dispatcher's cost model: what it is fitted to, and how little is lost by believing it."""

import dataclasses
import math
from pathlib import Path

import pytest

from einlinear.bench import fitting
from einlinear.bench.results import Bench, read
from einlinear.ops import costs as costs_model

KEPT = sorted((Path(__file__).parents[2] / "docs" / "benchmarks").glob("cpu*/bench.json"))


@pytest.fixture(scope="module")
def kept() -> list[Bench]:
    """The measurements that are kept in the repository."""
    assert len(KEPT) == 2
    return [read(path) for path in KEPT]


def test_little_is_lost_by_believing_the_model(kept: list[Bench]) -> None:
    found = [loss for loss, _ in fitting.losses(kept)]
    assert len(found) > 300
    assert sum(loss <= 1.1 for loss in found) / len(found) > 0.9
    assert math.exp(sum(map(math.log, found)) / len(found)) < 1.03


def test_the_model_is_the_fit_of_what_is_kept(kept: list[Bench]) -> None:
    found = fitting.fit(kept)
    assert found.keys() == costs_model.COSTS.keys()
    for mode, costs in found.items():
        assert costs.keys() == costs_model.COSTS[mode].keys()
        for name, coefficients in costs.items():
            assert coefficients == pytest.approx(costs_model.COSTS[mode][name], rel=1e-2)


def test_a_run_without_an_executor_is_refused(kept: list[Bench]) -> None:
    results = tuple(result for result in kept[0].results if result.case.mode == "decode")
    decoding = dataclasses.replace(kept[0], results=results)
    with pytest.raises(ValueError, match=r"no measurements .* of dense \(train\), reference \(train\)"):
        fitting.fit([decoding])
