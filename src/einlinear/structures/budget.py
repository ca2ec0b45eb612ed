"""The richest structure that a budget of MACs allows: the largest rank, or the fewest blocks.

`make` builds the structure for a rank or a number of blocks. `max_macs` is a fraction of the MACs of dense.
"""

from __future__ import annotations

from collections.abc import Callable

from einlinear.structures.limits import MAX_SIZE
from einlinear.structures.sizes import DoesNotFit
from einlinear.structures.structure import Structure

_MAX_BLOCKS = 1024


class OverBudget(ValueError):
    """No structure is within a budget of MACs."""


def within(s: Structure, max_macs: float) -> Structure:
    """The structure, which is within the budget. Raises OverBudget that says what it needs if it is not."""
    if _fraction(s) > max_macs:
        raise OverBudget(
            f"max_macs={max_macs:g} of dense is too small for {s.spec} at {s.in_features} -> {s.out_features}: "
            f"it needs {_fraction(s):.4g}"
        )
    return s


def largest_rank(make: Callable[[int], Structure], max_macs: float) -> Structure:
    """The structure of largest rank within the budget: doubling, then bisection."""
    best = within(make(1), max_macs)
    low, high = 1, 2
    while high <= MAX_SIZE and _fraction(candidate := make(high)) <= max_macs:
        if candidate.macs == best.macs:  # the pattern makes no use of the rank
            return best
        best, low, high = candidate, high, 2 * high
    high = min(high, MAX_SIZE + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if _fraction(candidate := make(middle)) <= max_macs:
            best, low = candidate, middle
        else:
            high = middle
    return best


def fewest_blocks(make: Callable[[int], Structure], most: int, max_macs: float) -> Structure:
    """The structure of fewest blocks, from one to `most`, within the budget, of those that fit the features.

    More than a thousand blocks are for the user to ask for.
    """
    cheapest: Structure | None = None
    refused: DoesNotFit | None = None
    for blocks in range(1, min(most, _MAX_BLOCKS) + 1):
        try:
            candidate = make(blocks)
        except DoesNotFit as error:
            refused = error
            continue
        if _fraction(candidate) <= max_macs:
            return candidate
        if cheapest is None or candidate.macs < cheapest.macs:
            cheapest = candidate
    if cheapest is None:
        assert refused is not None
        raise refused
    return within(cheapest, max_macs)


def _fraction(s: Structure) -> float:
    """Its MACs over those of dense."""
    return s.macs / (s.in_features * s.out_features)
