"""Low rank of every size from one eigendecomposition: the principal components of a layer's outputs."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from einlinear.compression.output_metric import OutputMetric, apply_roots

# the results of `low_ranks`
LowRanks = tuple[Tensor, Tensor, Tensor]
# smaller errors count as this one
NO_ERROR = 1e-12


@torch.no_grad()
def low_ranks(
    weight: Tensor, moment: Tensor, metric: OutputMetric | None, frequencies: Tensor | None = None
) -> LowRanks:
    """Return factors A (out, n) and B (n, in) whose first r columns and rows are the best rank r, and the energies.

    The energy of a component, in decreasing order of what it counts in the metric, is the error without it. For a
    weight (out, in) and inputs with second moment (in, in); all in float64. Stacks of both have stacks of all three.
    Frequencies (out,) say how much the error of each output counts; None: all count alike.
    """
    w = weight.double()
    root, inverse = (None, None) if metric is None else metric.factored()
    weighted = w if root is None else apply_roots(root, w[None])[0]
    energies, directions = _principal_outputs(weighted, moment.double())
    after = directions if inverse is None else apply_roots(inverse, directions[None])[0]
    # the components' outputs are uncorrelated, so their errors add up
    squares = after.square() if frequencies is None else after.square() * frequencies[:, None]
    return after, directions.mT @ weighted, energies * squares.sum(-2)


def _principal_outputs(w: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the energies of the principal components of outputs, decreasing, and their directions (out, n)."""
    if w.shape[-2] <= c.shape[-1]:
        energies, directions = torch.linalg.eigh(w @ c @ w.mT)
    else:
        variances, axes = torch.linalg.eigh(c)
        outputs = w @ (axes * variances.clamp(min=0).sqrt()[..., None, :])
        energies, right = torch.linalg.eigh(outputs.mT @ outputs)
        directions = torch.linalg.qr((outputs @ right).flip(-1))[0].flip(-1)
    return energies.clamp(min=0).flip(-1), directions.flip(-1)


@dataclass(frozen=True)
class Spectrum:
    """Errors of low-rank approximations by rank, from rank 0 on, and the share of parameters that one rank takes."""

    errors: tuple[float, ...]
    share: float

    @classmethod
    def of(cls, weight: Tensor, energies: Tensor) -> Spectrum:
        """Compute it for a weight (out, in) and the energies of its components, or for stacks, whose errors add up."""
        energies, matrix = energies.reshape(-1, energies.shape[-1]).sum(0), weight.shape[-2:]
        errors = energies.flip(0).cumsum(0).flip(0) / energies.sum().clamp(min=1e-300)
        return cls((*errors.tolist(), 0.0), sum(matrix) / matrix.numel())

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Spectrum:
        return cls(tuple(map(float, record["errors"])), float(record["share"]))

    def at(self, share: float) -> float:
        """Return the error of the low rank that keeps a share of the parameters, log-linear between two ranks."""
        rank = min(max(share / self.share, 0.0), len(self.errors) - 1.0)
        low = min(int(rank), len(self.errors) - 2)
        return between(rank, [low, low + 1], self.errors[low : low + 2])


def between(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Interpolate log y linearly at x, whose points increase; beyond the ends the outer two points extrapolate."""
    right = min(max(bisect(xs, x), 1), len(xs) - 1)
    share = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
    low, high = (math.log(max(y, NO_ERROR)) for y in ys[right - 1 : right + 1])
    return round(math.exp(low + share * (high - low)), 12)
