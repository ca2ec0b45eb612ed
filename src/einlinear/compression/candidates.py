"""What a layer could become: members of the families that are allowed, with the error that each would leave.

Fitting every member would take hours. So of each family a few are fitted, briefly, and the errors of those between them
are interpolated, in the logarithm, over the cost. How much a fit gains that goes on to its end is seen at one of them.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from einlinear.structures import DoesNotFit, Structure, structure

CONSIDERED = tuple(n / 40 for n in range(2, 39))  # fractions of dense that a layer may be reduced to
_PROBED = 3  # members of a family that are fitted, beside the one that is fitted to the end

DEFAULT = ("low_rank", "monarch", "btt", "blast(blocks=4)")


@dataclass(frozen=True)
class Candidate:
    """A member of a family, for one layer. `cost` is in parameters or MACs, `error` the relative squared error."""

    spec: str
    cost: int
    error: float


def members(family: str, in_features: int, out_features: int, fractions: Sequence[float]) -> Iterator[Structure]:
    """The richest members that fractions of dense's MACs allow, each once, those that cost as much as dense left out.

    Args:
        family: a spec without its rank or blocks, or a spec that is complete, which is its only member.
        in_features, out_features: of the layer.
        fractions: in increasing order.
    """
    try:
        structure(family, in_features, out_features, max_macs=1.0)  # anything else that is wrong with it is an error
    except DoesNotFit:
        return
    seen = set[str]()
    for fraction in fractions:
        try:
            s = structure(family, in_features, out_features, max_macs=fraction)
        except ValueError:  # none is so cheap
            continue
        if s.spec not in seen and s.params < in_features * out_features:
            seen.add(s.spec)
            yield s


def probed(considered: Sequence[Structure]) -> list[Structure]:
    """Those to fit: the cheapest, the richest and some between.

    >>> probed([*range(10)]), probed([7])
    ([0, 4, 9], [7])
    """
    last = len(considered) - 1
    return (
        [considered[i] for i in sorted({round(n * last / (_PROBED - 1)) for n in range(_PROBED)})] if considered else []
    )


def interpolated(considered: Sequence[tuple[str, int]], fitted: Sequence[tuple[int, float]]) -> list[Candidate]:
    """Candidates (spec, cost) with their errors, between those (cost, error) that were fitted; none beyond them.

    >>> interpolated([("a", 10), ("b", 20), ("c", 40)], [(10, 0.4), (30, 0.1)])
    [Candidate(spec='a', cost=10, error=0.4), Candidate(spec='b', cost=20, error=0.2)]
    """
    known = sorted(fitted)
    costs = [cost for cost, _ in known]
    found = []
    for spec, cost in considered:
        if not costs or not costs[0] <= cost <= costs[-1]:
            continue
        right = min(bisect(costs, cost), len(costs) - 1)
        (low, error_low), (high, error_high) = known[right - 1] if right else known[0], known[right]
        share = (cost - low) / (high - low) if high > low else 0.0
        logs = [math.log(max(error, 1e-12)) for error in (error_low, error_high)]
        found.append(Candidate(spec, cost, round(math.exp(logs[0] + share * (logs[1] - logs[0])), 12)))
    return found
