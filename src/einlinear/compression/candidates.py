"""Candidates for each layer: members of families of structures, and the errors that they would leave.

One spectrum yields the errors of low rank. Those of another family are a multiple of them that changes slowly with the
size: it is measured for a few members, which are fitted to the layer, and interpolated.
"""

from __future__ import annotations

import math
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
from einlinear.nn.dense_layers import features, weight_matrix
from einlinear.structures import DoesNotFit, Structure, structure
from einlinear.structures.spec import OverBudget

DEFAULT_FAMILIES = ("low_rank", "monarch", "btt", "blast(blocks=4)")
# of the dense MACs of a layer
_FRACTIONS = tuple(n / 40 for n in range(2, 39))
# smaller errors count as this one
_NO_ERROR = 1e-12


@dataclass(frozen=True)
class LayerCandidate:
    """A structure for one layer, or "dense", with the error of the layer's outputs and the change of the model's.

    An empty precision is that of the dense layer.
    """

    spec: str
    cost: int
    error: float
    output_change: float
    precision: str = ""

    @property
    def label(self) -> str:
        """The structure, and the precision if it is not that of the dense layer."""
        return f"{self.spec}, {self.precision}" if self.precision else self.spec


def members_by_layer(
    layers: Mapping[str, Any], families: Sequence[str], budget: float, count: str
) -> tuple[dict[str, dict[str, list[Structure]]], dict[str, str]]:
    """Return the members of each family by layer, and why layers have none. ValueError for too small a budget."""
    structures = {name: {f: list(members(f, *features(layer))) for f in families} for name, layer in layers.items()}
    reasons, dense, least = dict[str, str](), 0, 0
    for name, layer in layers.items():
        size, costs = layer.weight.numel(), [getattr(s, count) for group in structures[name].values() for s in group]
        dense, least = dense + size, least + min([size, *costs])
        if not costs:
            reasons[name] = _reason_for_none(families, *features(layer))
    if least > budget * dense:
        because = "".join(f"; {name}: {reason}" for name, reason in reasons.items())
        share = f"{budget:g} of the {dense:,} {count} of {len(layers)} layers cannot be reached"
        raise ValueError(f"{share} with {', '.join(families)}: these keep {least / dense:.4f} at least{because}")
    return structures, reasons


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
    """Return "dense" and the members of families as candidates for a layer.

    `cached(content, compute, decode)` reads a result, or computes it from the layer's inputs and their second moment.
    """
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


def _decode_errors(structures: Sequence[Structure], record: Mapping[str, Any]) -> dict[str, float]:
    return {s.spec: float(record[s.spec]) for s in structures}


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
    """Return the errors of all members by spec: some are fitted, the others are interpolated."""
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
