"""What a layer could become: members of the families that are allowed, with the error that each would leave.

Fitting every member would take hours. The errors of low rank are known at once, from one spectrum; those of another
family are close to a multiple of them that changes slowly with the size: of each family a few members are fitted, and
the multiple is interpolated between them.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from einlinear.structures import DoesNotFit, Structure, structure
from einlinear.structures.budget import OverBudget

CONSIDERED = tuple(n / 40 for n in range(2, 39))  # fractions of dense that a layer may be reduced to
_PROBED = (0.25, 0.5, 0.75)  # those at which members are fitted
_NOTHING = 1e-12  # an error that is none

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
    except (DoesNotFit, OverBudget):
        return
    seen = set[str]()
    for fraction in fractions:
        try:
            s = structure(family, in_features, out_features, max_macs=fraction)
        except (DoesNotFit, OverBudget):  # none is so cheap
            continue
        if s.spec not in seen and s.params < in_features * out_features:
            seen.add(s.spec)
            yield s


def reason_for_none(families: Sequence[str], in_features: int, out_features: int) -> str | None:
    """Why no member of any family is smaller than the dense layer; None if one is.

    >>> reason_for_none(["low_rank", "btt"], 64, 1)
    'no structure fits 64 -> 1: low_rank saves nothing; btt saves nothing'
    >>> reason_for_none(["low_rank", "btt"], 64, 2) is None
    True
    """
    reasons = []
    for family in families:
        if any(True for _ in members(family, in_features, out_features, CONSIDERED)):
            return None
        try:
            structure(family, in_features, out_features, max_macs=1.0)
            reasons.append(f"{family} saves nothing")
        except DoesNotFit as error:
            reasons.append(str(error))
        except OverBudget:
            reasons.append(f"{family} saves nothing")
    return f"no structure fits {in_features} -> {out_features}: {'; '.join(reasons)}"


def probed(considered: Sequence[Structure]) -> list[Structure]:
    """Those to fit."""
    if not considered:
        return []
    return list(dict.fromkeys(min(considered, key=lambda s: abs(_share(s) - share)) for share in _PROBED))


@dataclass(frozen=True)
class Spectrum:
    """What low rank leaves of a layer's outputs.

    Attributes:
        left: the relative squared error by rank, from rank 0 on.
        share: of dense's parameters that one rank takes.
    """

    left: tuple[float, ...]
    share: float

    @classmethod
    def of(cls, weight: Tensor, moment: Tensor) -> Spectrum:
        """Of a weight (out, in), on inputs of a second moment (in, in).

        >>> Spectrum.of(torch.diag(torch.tensor([1.0, 2.0, 0.0])), torch.eye(3))
        Spectrum(left=(1.0, 0.2, 0.0, 0.0), share=0.6666666666666666)
        """
        w, c = weight.double(), moment.double()
        if len(w) <= len(c):
            gram = w @ c @ w.T
        else:
            variances, directions = torch.linalg.eigh(c)
            root = directions * variances.clamp(min=0).sqrt()
            gram = root.T @ (w.T @ w) @ root
        energies = torch.linalg.eigvalsh(gram).clamp(min=0)  # the smallest first
        left = (energies.cumsum(0) / energies.sum().clamp(min=1e-300)).flip(0)
        return cls((*left.tolist(), 0.0), sum(weight.shape) / weight.numel())

    def at(self, share: float) -> float:
        """The error of the low rank that keeps a share of the parameters, between two ranks in the logarithm."""
        rank = min(max(share / self.share, 0.0), len(self.left) - 1.0)
        low = min(int(rank), len(self.left) - 2)
        return _between(rank, [low, low + 1], self.left[low : low + 2])


def estimated(considered: Sequence[Structure], errors: Mapping[str, float], spectrum: Spectrum) -> dict[str, float]:
    """The errors of all members by spec, from those of a few."""
    fitted = sorted((_share(s), errors[s.spec]) for s in considered if s.spec in errors)
    shares = [0.0, *(share for share, _ in fitted)]  # of nothing, all make nothing
    multiples = [1.0, *(max(error, _NOTHING) / max(spectrum.at(share), _NOTHING) for share, error in fitted)]
    found = {}
    for s in considered:
        share = _share(s)
        guess = _between(share, shares, multiples) * max(spectrum.at(share), _NOTHING)
        found[s.spec] = errors.get(s.spec, min(guess, 1.0))
    return found


def _share(s: Structure) -> float:
    return s.params / (s.in_features * s.out_features)


def _between(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """y at x, linear in its logarithm between the points, whose x increase; beyond the last ones as between these.

    >>> _between(2.0, [1.0, 3.0], [0.1, 10.0]), _between(4.0, [1.0, 3.0], [0.1, 10.0])
    (1.0, 100.0)
    """
    right = min(max(bisect(xs, x), 1), len(xs) - 1)
    share = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
    low, high = (math.log(max(y, _NOTHING)) for y in ys[right - 1 : right + 1])
    return round(math.exp(low + share * (high - low)), 12)
