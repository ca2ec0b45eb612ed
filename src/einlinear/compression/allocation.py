"""Which candidate each layer gets: the least total error within a budget, as an integer linear program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from einlinear.compression.candidates import Candidate


def allocate(candidates: Mapping[str, Sequence[Candidate]], budget: int) -> dict[str, Candidate]:
    """One candidate per layer, of the least sum of errors, whose costs together are within the budget.

    Args:
        candidates: of every layer; `error` already weighted by how much the layer's errors matter.
        budget: in the unit of the costs.

    Returns:
        The choice for every layer.

    Raises:
        ValueError: even the cheapest candidates cost more; says how much.
        ImportError: scipy is not installed.

    Example:
        >>> from einlinear.compression.candidates import Candidate
        >>> keep, half = Candidate("dense", 10, 0.0), Candidate("btt", 5, 0.2)
        >>> chosen = allocate({"a": [keep, half], "b": [keep, Candidate("btt", 5, 0.1)]}, budget=15)
        >>> chosen["a"].spec, chosen["b"].spec
        ('dense', 'btt')
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    least = sum(min(candidate.cost for candidate in own) for own in candidates.values())
    if least > budget:
        raise ValueError(f"the cheapest choice for all layers costs {least:,}, more than the budget of {budget:,}")
    choices = [(name, candidate) for name, own in candidates.items() for candidate in own]
    errors = np.array([candidate.error for _, candidate in choices])
    costs = np.array([candidate.cost for _, candidate in choices], dtype=float)
    one_each = np.array([[float(name == layer) for name, _ in choices] for layer in candidates])
    found = milp(
        errors / max(errors.max(), 1e-300),
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(costs[None] / budget, 0, 1)],
        options={"mip_rel_gap": 1e-7, "time_limit": 60.0},
    )
    if found.x is None:
        raise RuntimeError(f"no allocation was found: {found.message}")
    return {name: candidate for (name, candidate), taken in zip(choices, found.x) if taken > 0.5}
