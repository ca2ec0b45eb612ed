"""Allocation: the candidate of each layer with which the model's output changes least within a budget."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from einlinear.compression.candidates import LayerCandidate
from einlinear.compression.selection import weight_of
from einlinear.structures import Structure


def allocate(candidates: Mapping[str, Sequence[LayerCandidate]], budget: int) -> dict[str, LayerCandidate]:
    """Choose one candidate per layer, by an integer linear program.

    Args:
        candidates: by layer.
        budget: largest sum of the costs.

    Returns:
        The candidates, by layer, with the least sum of output changes.

    Raises:
        ValueError: even the cheapest candidates cost more than the budget.
        ImportError: scipy is not installed.

    Example:
        >>> from einlinear.compression.candidates import LayerCandidate
        >>> dense, half = LayerCandidate("dense", 10, 0.0, 0.0), LayerCandidate("btt", 5, 0.2, 0.2)
        >>> chosen = allocate({"a": [dense, half], "b": [dense, LayerCandidate("btt", 5, 0.1, 0.1)]}, budget=15)
        >>> chosen["a"].spec, chosen["b"].spec
        ('dense', 'btt')
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    least = _least_cost(candidates)
    if least > budget:
        raise ValueError(f"the cheapest choice for all layers costs {least:,}, more than the budget of {budget:,}")
    choices = [(name, candidate) for name, options in candidates.items() for candidate in options]
    changes = np.array([candidate.output_change for _, candidate in choices])
    costs = np.array([candidate.cost for _, candidate in choices], dtype=float)
    one_each = np.array([[float(name == layer) for name, _ in choices] for layer in candidates])
    solution = milp(
        changes / max(changes.max(), 1e-300),
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(costs[None] / budget, 0, 1)],
        options={"mip_rel_gap": 1e-7, "time_limit": 60.0},
    )
    if solution.x is None:
        raise RuntimeError(f"no allocation was found: {solution.message}")
    return {name: candidate for (name, candidate), x in zip(choices, solution.x, strict=True) if x > 0.5}


def allocate_faster(
    candidates: Mapping[str, Sequence[LayerCandidate]], budget: int, is_slower: Callable[[str, str], bool]
) -> tuple[dict[str, LayerCandidate], list[str]]:
    """Choose one candidate per layer, none slower than the dense layer: slower ones are removed until none is chosen.

    Args:
        candidates, budget: as in `allocate`; the budget may not be reached.
        is_slower: whether a spec is slower than the dense layer of a name.

    Returns:
        The candidates by layer, and the layers for which every structure tried is slower.
    """
    left = {name: list(options) for name, options in candidates.items()}
    while True:
        chosen = allocate(left, max(budget, _least_cost(left)))
        slow = {name: c for name, c in chosen.items() if c.spec != "dense" and is_slower(name, c.spec)}
        if not slow:
            return chosen, [name for name in left if len(left[name]) == 1 < len(candidates[name])]
        for name, c in slow.items():
            # richer members of the same family are no faster
            left[name] = [o for o in left[name] if o.cost < c.cost or _family(o.spec) != _family(c.spec)]


def check_budget(
    layers: Mapping[str, Any],
    budget: float,
    count: str,
    structured: Mapping[str, Mapping[str, Sequence[Structure]]],
    unfit: Mapping[str, str | None],
) -> None:
    """Raise ValueError if no structures, by layer and family, reach a budget; `unfit` says which layers have none."""
    dense, least = 0, 0
    for name, layer in layers.items():
        size = weight_of(layer).numel()
        costs = [getattr(s, count) for structures in structured[name].values() for s in structures]
        dense, least = dense + size, least + min([size, *costs])
    if least > budget * dense:
        why = "".join(f"; {name}: {reason}" for name, reason in unfit.items() if reason is not None)
        raise ValueError(
            f"{budget:g} of the {dense:,} {count} of {len(layers)} layers cannot be reached with "
            f"{', '.join(next(iter(structured.values())))}: these keep {least / dense:.4f} at least{why}"
        )


def _least_cost(candidates: Mapping[str, Sequence[LayerCandidate]]) -> int:
    return sum(min(candidate.cost for candidate in options) for options in candidates.values())


def _family(spec: str) -> str:
    """The spec without its sizes, which members of a family share."""
    return re.sub(r"\d+", "", spec)
