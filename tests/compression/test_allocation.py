"""Which candidate each layer gets, against trying all of them; and which candidates there are."""

from __future__ import annotations

import itertools
import random

import pytest

from einlinear.compression.allocation import allocate
from einlinear.compression.candidates import CONSIDERED, Candidate, interpolated, members


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", [1e-14, 1.0, 1e14])  # importances are gradients, of any size
@pytest.mark.parametrize("budget", [12, 20, 31])
def test_the_least_error_within_the_budget(seed: int, budget: int, scale: float) -> None:
    rng = random.Random(seed)
    options = {
        f"layer {i}": [Candidate(f"{i} {k}", rng.randint(1, 12), scale * rng.random()) for k in range(5)]
        for i in range(5)
    }
    combinations = itertools.product(*options.values())
    affordable = [taken for taken in combinations if sum(c.cost for c in taken) <= budget]
    if not affordable:
        with pytest.raises(ValueError, match=f"more than the budget of {budget}"):
            allocate(options, budget)
        return
    best = min(sum(c.error for c in taken) for taken in affordable)
    chosen = allocate(options, budget)
    assert chosen.keys() == options.keys()
    assert sum(c.cost for c in chosen.values()) <= budget
    assert sum(c.error for c in chosen.values()) == pytest.approx(best, rel=1e-3, abs=0)


def test_errors_between_those_that_were_fitted() -> None:
    fitted = [(40, 0.1), (10, 0.4), (20, 0.2)]
    found = interpolated([("less", 9), ("first", 10), ("between", 30), ("last", 40), ("more", 41)], fitted)
    assert [c.spec for c in found] == ["first", "between", "last"]
    assert [c.error for c in found] == pytest.approx([0.4, 0.02**0.5, 0.1])
    assert interpolated([("exact", 5)], [(5, 0.0)]) == [Candidate("exact", 5, 1e-12)]
    assert interpolated([("any", 5)], []) == []


def test_members_of_families() -> None:
    ranks = [s.spec for s in members("low_rank", 64, 32, CONSIDERED)]
    assert len(ranks) == len(set(ranks)) > 10
    assert all(s.params < 64 * 32 for s in members("monarch", 64, 32, CONSIDERED))
    assert [s.spec for s in members("btt(rank=1)", 64, 64, CONSIDERED)] == ["btt"]
    assert list(members("monarch(blocks=4)", 64, 2, CONSIDERED)) == []  # no room for four blocks
    with pytest.raises(ValueError, match=r"unknown family 'lowrank'\. Did you mean 'low_rank'"):
        list(members("lowrank", 64, 64, CONSIDERED))
