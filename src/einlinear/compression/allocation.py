"""Allocation: candidates for each layer with the errors they would leave, and the choice of one per layer.

One spectrum yields the errors of low rank. Those of another family are a multiple of them that changes slowly with the
size: it is fitted for a few members, and interpolated.
"""

from __future__ import annotations

import math
import re
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from einlinear import ops
from einlinear.compression.calibration import InputStatistics
from einlinear.compression.sensitivity import Sensitivity
from einlinear.nn.layer_kinds import features, weight_matrix
from einlinear.structures import DoesNotFit, Structure, structure
from einlinear.structures.spec import OverBudget

DEFAULT_FAMILIES = ("low_rank", "monarch", "btt", "blast(blocks=4)")
# of the dense MACs of a layer
_FRACTIONS = tuple(n / 40 for n in range(2, 39))
# smaller errors count as this one
_NO_ERROR = 1e-12


@dataclass(frozen=True)
class LayerCandidate:
    """A structure for one layer, or "dense", with the error of the layer's outputs and the change of the model's."""

    spec: str
    cost: int
    error: float
    output_change: float


def members(
    family: str, in_features: int, out_features: int, fractions: Sequence[float] = _FRACTIONS
) -> Iterator[Structure]:
    """Yield the richest member of a family at each fraction of the dense MACs, if it has fewer parameters."""
    seen = set[str]()
    for fraction in fractions:
        # any other mistake in the spec raises
        with suppress(DoesNotFit, OverBudget):
            s = structure(family, in_features, out_features, max_macs=fraction)
            if s.spec not in seen and s.params < in_features * out_features:
                seen.add(s.spec)
                yield s


def members_that_fit(
    layers: Mapping[str, Any], families: Sequence[str], budget: float, count: str
) -> tuple[dict[str, dict[str, list[Structure]]], dict[str, str]]:
    """Return the members of each family by layer, and the reasons for layers without any; check the budget."""
    fitting = {name: {f: list(members(f, *features(layer))) for f in families} for name, layer in layers.items()}
    unfit, dense, least = dict[str, str](), 0, 0
    for name, layer in layers.items():
        size, structures = layer.weight.numel(), [s for of_family in fitting[name].values() for s in of_family]
        dense, least = dense + size, least + min([size, *(getattr(s, count) for s in structures)])
        if not structures:
            unfit[name] = _reason_for_none(families, *features(layer))
    if least > budget * dense:
        reasons = "".join(f"; {name}: {reason}" for name, reason in unfit.items())
        share = f"{budget:g} of the {dense:,} {count} of {len(layers)} layers cannot be reached"
        raise ValueError(f"{share} with {', '.join(families)}: these keep {least / dense:.4f} at least{reasons}")
    return fitting, unfit


def _reason_for_none(families: Iterable[str], in_features: int, out_features: int) -> str:
    reasons = []
    for family in families:
        reasons.append(f"{family} saves nothing")
        try:
            with suppress(OverBudget):
                structure(family, in_features, out_features, max_macs=1.0)
        except DoesNotFit as error:
            reasons[-1] = str(error)
    return f"no structure fits {in_features} -> {out_features}: {'; '.join(reasons)}"


def layer_candidates(
    layer: Any, families: dict[str, list[Structure]], count: str, sensitivity: Sensitivity, cached: Callable[..., Any]
) -> list[LayerCandidate]:
    """Return "dense" and the members of families as candidates for a layer; `cached` computes what a cache lacks."""
    weight = weight_matrix(layer)
    spectrum = cached("spectrum", lambda _, moment: asdict(Spectrum.of(weight, moment)), Spectrum.from_record)
    candidates = [LayerCandidate("dense", weight.numel(), 0.0, 0.0)]
    for family, structures in families.items():
        fitted = members_to_fit(structures)
        decode = partial(_decode_errors, fitted)
        errors = cached(f"errors of {family}", partial(fitted_errors, fitted, layer), decode)
        for s, error in zip(structures, estimated_errors(structures, errors, spectrum).values(), strict=True):
            candidates.append(LayerCandidate(s.spec, getattr(s, count), error, sensitivity.at(error)))
    return candidates


def _decode_errors(structures: Sequence[Structure], record: Mapping[str, Any]) -> dict[str, float]:
    return {s.spec: float(record[s.spec]) for s in structures}


def members_to_fit(considered: Sequence[Structure]) -> list[Structure]:
    """Return the members whose errors are measured; those of the others are interpolated."""
    shares = (0.25, 0.5, 0.75) if considered else ()
    return list(dict.fromkeys(min(considered, key=lambda s: abs(_share(s) - share)) for share in shares))


@torch.no_grad()
def fitted_errors(
    structures: Sequence[Structure], layer: Any, statistics: InputStatistics, moment: Tensor
) -> dict[str, float]:
    """Fit structures to a layer, and return their relative squared errors by spec."""
    weight = weight_matrix(layer)
    return {
        s.spec: statistics.relative_error(weight, ops.dense_weight(s, ops.project(s, weight, moment)))
        for s in structures
    }


@dataclass(frozen=True)
class Spectrum:
    """Errors of low-rank approximations by rank, from rank 0 on, and the share of parameters that one rank takes."""

    errors: tuple[float, ...]
    share: float

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor, moment: Tensor) -> Spectrum:
        """Compute it for a weight (out, in) and inputs with second moment (in, in)."""
        w, c = weight.double(), moment.double()
        if len(w) <= len(c):
            gram = w @ c @ w.T
        else:
            variances, directions = torch.linalg.eigh(c)
            root = directions * variances.clamp(min=0).sqrt()
            gram = root.T @ (w.T @ w) @ root
        energies = torch.linalg.eigvalsh(gram).clamp(min=0)
        # eigenvalues increase
        errors = (energies.cumsum(0) / energies.sum().clamp(min=1e-300)).flip(0)
        return cls((*errors.tolist(), 0.0), sum(weight.shape) / weight.numel())

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Spectrum:
        return cls(tuple(map(float, record["errors"])), float(record["share"]))

    def at(self, share: float) -> float:
        """Return the error of the low rank that keeps a share of the parameters, log-linear between two ranks."""
        rank = min(max(share / self.share, 0.0), len(self.errors) - 1.0)
        low = min(int(rank), len(self.errors) - 2)
        return _between(rank, [low, low + 1], self.errors[low : low + 2])


def estimated_errors(
    considered: Sequence[Structure], errors: Mapping[str, float], spectrum: Spectrum
) -> dict[str, float]:
    """Return the errors of all members by spec, from those of a few."""
    fitted = sorted((_share(s), errors[s.spec]) for s in considered if s.spec in errors)
    # without parameters all families have the same error
    shares = [0.0, *(share for share, _ in fitted)]
    multiples = [1.0, *(max(error, _NO_ERROR) / max(spectrum.at(share), _NO_ERROR) for share, error in fitted)]

    def estimate(share: float) -> float:
        return min(_between(share, shares, multiples) * max(spectrum.at(share), _NO_ERROR), 1.0)

    return {s.spec: errors[s.spec] if s.spec in errors else estimate(_share(s)) for s in considered}


def _share(s: Structure) -> float:
    return s.params / (s.in_features * s.out_features)


def _between(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Interpolate log y linearly at x, whose points increase; beyond the ends the outer two points extrapolate."""
    right = min(max(bisect(xs, x), 1), len(xs) - 1)
    share = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
    low, high = (math.log(max(y, _NO_ERROR)) for y in ys[right - 1 : right + 1])
    return round(math.exp(low + share * (high - low)), 12)


def allocate(candidates: Mapping[str, Sequence[LayerCandidate]], budget: int) -> dict[str, LayerCandidate]:
    """Choose one candidate per layer, by an integer linear program: the least sum of output changes within a budget."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    if (least := _least_cost(candidates)) > budget:
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
    """Choose one candidate per layer that is not slower than dense, if need be over the budget; or list the layer."""
    left = {name: list(options) for name, options in candidates.items()}
    while True:
        chosen = allocate(left, max(budget, _least_cost(left)))
        slow = {name: c for name, c in chosen.items() if c.spec != "dense" and is_slower(name, c.spec)}
        if not slow:
            return chosen, [name for name in left if len(left[name]) == 1 < len(candidates[name])]
        for name, c in slow.items():
            # richer members of the same family are no faster
            left[name] = [o for o in left[name] if o.cost < c.cost or _family(o.spec) != _family(c.spec)]


def _least_cost(candidates: Mapping[str, Sequence[LayerCandidate]]) -> int:
    return sum(min(candidate.cost for candidate in options) for options in candidates.values())


def _family(spec: str) -> str:
    # without sizes
    return re.sub(r"\d+", "", spec)
