"""Candidates for a layer: members of the allowed families, each with the error that it would leave.

Fitting every member would take hours. One spectrum yields the errors of low rank. Those of another family are close to
a multiple of them that changes slowly with the size: a few members of each family are fitted, and the multiple is
interpolated between them.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from einlinear import ops
from einlinear.compression.second_moments import InputStatistics
from einlinear.compression.selection import weight_of
from einlinear.structures import DoesNotFit, Structure, structure
from einlinear.structures.spec import OverBudget

# fractions of the dense cost that a layer may be reduced to
FRACTIONS = tuple(n / 40 for n in range(2, 39))
# fractions at which members are fitted
_FITTED = (0.25, 0.5, 0.75)
# errors below this one count as none
_NO_ERROR = 1e-12

DEFAULT_FAMILIES = ("low_rank", "monarch", "btt", "blast(blocks=4)")


@dataclass(frozen=True)
class LayerCandidate:
    """A structure for one layer, or "dense".

    Attributes:
        spec: of the structure.
        cost: in parameters or MACs.
        error: relative squared error of the layer's outputs.
        output_change: how far the model's output moves with that error.
    """

    spec: str
    cost: int
    error: float
    output_change: float


@torch.no_grad()
def fitted_errors(
    structures: Sequence[Structure], layer: Any, damping: float, statistics: InputStatistics
) -> dict[str, float]:
    """Fit structures to a layer, and return their relative squared errors by spec."""
    weight, moment = weight_of(layer), statistics.damped(damping)
    return {
        s.spec: statistics.relative_error(weight, ops.dense_weight(s, ops.project(s, weight, moment)))
        for s in structures
    }


def members(
    family: str, in_features: int, out_features: int, fractions: Sequence[float] = FRACTIONS
) -> Iterator[Structure]:
    """Yield the richest member of a family at each fraction of the dense MACs, if it has fewer parameters.

    Args:
        family: a spec without its rank or blocks, or a complete spec, which is its only member.
        in_features, out_features: of the layer.
        fractions: in increasing order.
    """
    seen = set[str]()
    for fraction in fractions:
        # any other mistake in the spec raises
        with suppress(DoesNotFit, OverBudget):
            s = structure(family, in_features, out_features, max_macs=fraction)
            if s.spec not in seen and s.params < in_features * out_features:
                seen.add(s.spec)
                yield s


def reason_for_none(families: Iterable[str], in_features: int, out_features: int) -> str:
    """Return why no family has a member that is smaller than the dense layer.

    >>> reason_for_none(["low_rank", "btt"], 64, 1)
    'no structure fits 64 -> 1: low_rank saves nothing; btt saves nothing'
    """
    reasons = []
    for family in families:
        try:
            structure(family, in_features, out_features, max_macs=1.0)
            reasons.append(f"{family} saves nothing")
        except DoesNotFit as error:
            reasons.append(str(error))
        except OverBudget:
            reasons.append(f"{family} saves nothing")
    return f"no structure fits {in_features} -> {out_features}: {'; '.join(reasons)}"


def members_to_fit(considered: Sequence[Structure]) -> list[Structure]:
    """Return the members whose errors are measured; those of the others are interpolated."""
    if not considered:
        return []
    return list(dict.fromkeys(min(considered, key=lambda s: abs(_share(s) - share)) for share in _FITTED))


@dataclass(frozen=True)
class Spectrum:
    """Errors of the best low-rank approximations of a layer.

    Attributes:
        errors: relative squared error by rank, from rank 0 on.
        share: fraction of the dense parameters that one rank takes.
    """

    errors: tuple[float, ...]
    share: float

    @classmethod
    def of(cls, weight: Tensor, moment: Tensor) -> Spectrum:
        """Compute it for a weight (out, in) and inputs with second moment (in, in).

        >>> Spectrum.of(torch.diag(torch.tensor([1.0, 2.0, 0.0])), torch.eye(3))
        Spectrum(errors=(1.0, 0.2, 0.0, 0.0), share=0.6666666666666666)
        """
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
        """Return the spectrum that a resume cache holds."""
        errors = tuple(map(float, record["errors"]))
        if len(errors) < 2:
            raise ValueError("a spectrum has the errors of at least two ranks")
        return cls(errors, float(record["share"]))

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
    estimates = {}
    for s in considered:
        share = _share(s)
        estimate = _between(share, shares, multiples) * max(spectrum.at(share), _NO_ERROR)
        estimates[s.spec] = errors.get(s.spec, min(estimate, 1.0))
    return estimates


def _share(s: Structure) -> float:
    return s.params / (s.in_features * s.out_features)


def _between(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Interpolate log y linearly at x, whose points increase; beyond the ends the outer two points extrapolate.

    >>> _between(2.0, [1.0, 3.0], [0.1, 10.0]), _between(4.0, [1.0, 3.0], [0.1, 10.0])
    (1.0, 100.0)
    """
    right = min(max(bisect(xs, x), 1), len(xs) - 1)
    share = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
    low, high = (math.log(max(y, _NO_ERROR)) for y in ys[right - 1 : right + 1])
    return round(math.exp(low + share * (high - low)), 12)
