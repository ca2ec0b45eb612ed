"""Exponents of rank, MACs and parameters, as functions of the number of features (arXiv 2410.02117, section 3)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction

from einlinear.structures.contraction import intermediate
from einlinear.structures.pattern import Pattern
from einlinear.structures.sizes import groups


def scaling_exponents(
    pattern: Pattern, sizes: Mapping[str, int], in_features: int, out_features: int
) -> tuple[float, float, float]:
    """psi, nu and omega: rank = n^psi, MACs = n^(1 + nu) and parameters / MACs = n^-omega for n features.

    As in the paper's closed forms, the factors are contracted in the order they are written in.
    """
    theta = _axis_exponents(pattern, sizes, in_features, out_features)

    def total(axes: Iterable[str]) -> Fraction:
        return sum((theta[axis] for axis in axes), Fraction(0))

    psi = macs = params = Fraction(0)
    for term in pattern.terms:
        path = [intermediate(term, tuple(range(n))) for n in range(len(term.factors) + 1)]
        psi = max(psi, min(Fraction(1), *map(total, path)))
        macs = max(macs, *(total({*axes, *factor}) for axes, factor in zip(path, term.factors)))
        params = max(params, *map(total, term.factors))
    return float(psi), float(macs - 1), float(macs - params)


def _axis_exponents(
    pattern: Pattern, sizes: Mapping[str, int], in_features: int, out_features: int
) -> dict[str, Fraction]:
    """The exponent of every axis: that of the pattern, else an equal share of what its group has left."""
    theta = {axis: size.exponent for axis, size in pattern.sizes}
    for group in groups(pattern, in_features, out_features):
        open_axes = [axis for axis in group.axes if axis not in theta]
        left = 1 - sum((theta[axis] for axis in group.axes if axis in theta), Fraction(0))
        theta.update({axis: left / len(open_axes) for axis in open_axes})
        if not open_axes and not any(theta[axis] for axis in group.axes) and group.features > 1:
            log = math.log(group.features)
            theta.update({axis: Fraction(math.log(sizes[axis]) / log) for axis in group.axes})
    return theta
