"""Which candidate each layer gets, against trying all of them."""

from __future__ import annotations

import itertools
import random

import pytest

from einlinear.compression.allocation import allocate
from einlinear.compression.candidates import Candidate


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
