"""Allocation of a budget: one candidate for every layer, so that the model's output changes least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from einlinear.compression.candidates import LayerCandidate


def allocate(
    candidates: Mapping[str, Sequence[LayerCandidate]],
    budget: int,
    modules: Sequence[Mapping[str, LayerCandidate]] = (),
) -> dict[str, LayerCandidate]:
    """Choose one candidate per layer, by an integer linear program: the least sum of output changes within a budget.

    `modules` are candidates of several layers that are chosen together, instead of one for each of these layers.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    if (least := least_cost(candidates, modules)) > budget:
        raise ValueError(f"the cheapest choice for all layers costs {least:,}, more than the budget of {budget:,}")
    choices = [{name: candidate} for name, options in candidates.items() for candidate in options]
    choices += [dict(module) for module in modules]
    changes = np.array([sum(c.output_change for c in choice.values()) for choice in choices])
    costs = np.array([sum(c.cost for c in choice.values()) for choice in choices], dtype=float)
    numbers = {layer: number for number, layer in enumerate(candidates)}
    rows, columns = zip(*((numbers[layer], i) for i, choice in enumerate(choices) for layer in choice), strict=True)
    one_each = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(candidates), len(choices)))
    solution = milp(
        changes / max(changes.max(), 1e-300),
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(costs[None] / budget, 0, 1)],
        options={"mip_rel_gap": 1e-7, "time_limit": 60.0},
    )
    if solution.x is None:
        raise RuntimeError(f"no allocation was found: {solution.message}")
    chosen = [choice for choice, x in zip(choices, solution.x, strict=True) if x > 0.5]
    return {name: candidate for choice in chosen for name, candidate in choice.items()}


def least_cost(
    candidates: Mapping[str, Sequence[LayerCandidate]], modules: Sequence[Mapping[str, LayerCandidate]] = ()
) -> int:
    """Return the cost of the cheapest choice, where modules have either all their layers in common or none."""
    alone = {name: min(candidate.cost for candidate in options) for name, options in candidates.items()}
    saved: dict[frozenset[str], int] = {}
    for module in modules:
        saving = sum(alone[name] - candidate.cost for name, candidate in module.items())
        saved[frozenset(module)] = max(saved.get(frozenset(module), 0), saving)
    return sum(alone.values()) - sum(saved.values())
