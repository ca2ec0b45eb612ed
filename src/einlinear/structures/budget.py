"""The richest structure within a budget of MACs: the largest rank, or the fewest blocks.

`make` builds the structure for a rank or a number of blocks. `max_macs` is a fraction of the MACs of dense.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

from einlinear.structures.limits import MAX_SIZE
from einlinear.structures.sizes import DoesNotFit
from einlinear.structures.structured_matrix import Structure

# More blocks are taken only where the user asks for them.
_MAX_BLOCKS = 1024


class OverBudget(ValueError):
    """No structure is within a budget of MACs."""


def within(structure: Structure, max_macs: float | None) -> Structure:
    """Return a structure that is within the budget, if any. Raises OverBudget with the budget that it needs."""
    if max_macs is not None and _fraction(structure) > max_macs:
        raise OverBudget(
            f"max_macs={max_macs:g} of dense is too small for {structure.spec} at {structure.in_features} -> "
            f"{structure.out_features}: it needs {_fraction(structure):.4g}"
        )
    return structure


def largest_rank(make: Callable[[int], Structure], max_macs: float) -> Structure:
    """Find the structure of largest rank within the budget, by doubling and bisection."""
    best, high = within(make(1), max_macs), 2
    while high <= MAX_SIZE and _fraction(candidate := make(high)) <= max_macs:
        if candidate.macs == best.macs:
            # the pattern makes no use of the rank
            return best
        best, high = candidate, 2 * high
    ranks = range(high // 2, min(high, MAX_SIZE + 1))
    return make(ranks[bisect_right(ranks, max_macs, key=lambda rank: _fraction(make(rank))) - 1])


def fewest_blocks(make: Callable[[int], Structure], most: int, max_macs: float) -> Structure:
    """Find the structure of fewest blocks within the budget, from one block to `most` blocks or 1024.

    Every number of blocks is tried: many do not fit the features, and padding makes the MACs rise and fall.
    """
    cheapest: Structure | None = None
    for blocks in range(1, min(most, _MAX_BLOCKS) + 1):
        try:
            candidate = make(blocks)
        except DoesNotFit:
            continue
        if _fraction(candidate) <= max_macs:
            return candidate
        if cheapest is None or candidate.macs < cheapest.macs:
            cheapest = candidate
    # if no number of blocks fits, the last one raises again
    return within(cheapest or make(blocks), max_macs)


def _fraction(structure: Structure) -> float:
    """The MACs, as a fraction of those of dense."""
    return structure.macs / (structure.in_features * structure.out_features)
