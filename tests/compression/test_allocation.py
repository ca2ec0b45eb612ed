"""Allocation, against trying all combinations."""

from __future__ import annotations

import itertools
import random

import pytest

from einlinear.compression.allocation import allocate
from einlinear.compression.candidates import LayerCandidate


def candidate(spec: str, cost: int, output_change: float) -> LayerCandidate:
    return LayerCandidate(spec, cost, 0.5, output_change)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", [1e-14, 1.0, 1e14])
@pytest.mark.parametrize("budget", [12, 20, 31])
def test_the_least_change_within_the_budget(seed: int, budget: int, scale: float) -> None:
    rng = random.Random(seed)
    options = {
        f"layer {i}": [candidate(f"{i} {k}", rng.randint(1, 12), scale * rng.random()) for k in range(5)]
        for i in range(5)
    }
    combinations = itertools.product(*options.values())
    affordable = [choice for choice in combinations if sum(c.cost for c in choice) <= budget]
    if not affordable:
        with pytest.raises(ValueError, match=f"more than the budget of {budget}"):
            allocate(options, budget)
        return
    best = min(sum(c.output_change for c in choice) for choice in affordable)
    chosen = allocate(options, budget)
    assert chosen.keys() == options.keys()
    assert sum(c.cost for c in chosen.values()) <= budget
    assert sum(c.output_change for c in chosen.values()) == pytest.approx(best, rel=1e-3, abs=0)
