"""The taxonomy: what the exponents psi, nu and omega of the structures have to do with their losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from einlinear.structures import structure
from einlinear_lab.findings.summary import Curve, Study
from einlinear_lab.runs.models import DENSE
from einlinear_lab.scaling import ExponentEffects, exponent_effects

AT_LEAST = 5  # structures
EXPONENTS = ("omega", "psi", "nu")


@dataclass(frozen=True)
class Entry:
    """One curve at the compute of a taxonomy.

    Attributes:
        curve: which.
        exponents: of its structure, by name.
        loss: interpolated between its models in log-log space.
    """

    curve: Curve
    exponents: Mapping[str, float]
    loss: float


@dataclass(frozen=True)
class Taxonomy:
    """The structures of a study at one compute.

    Attributes:
        compute: MACs per input, the most that all of the structures reach.
        entries: in the order of the study's curves.
        effects: of the exponents on the loss against that of dense; None where dense is not among them.
    """

    compute: float
    entries: tuple[Entry, ...]
    effects: ExponentEffects | None


def taxonomy_of(study: Study, measure: str) -> Taxonomy | None:
    """Compare the curves that have a loss at a compute they all reach; None of fewer than five structures.

    Naive curves are controls and left out.
    """
    found = []
    for curve in study.curves:
        means = [(row.result.macs, mean) for row in curve.best if (mean := row.mean(measure))]
        if means and curve.options.get("structure_aware", True) and (exponents := _exponents(curve)):
            found.append((curve, exponents, sorted(means)))
    compute = float(min((means[-1][0] for *_, means in found), default=0))
    entries = tuple(
        Entry(curve, exponents, _loss_at(compute, means)) for curve, exponents, means in found if means[0][0] <= compute
    )
    if len({own.curve.structure for own in entries}) < AT_LEAST:
        return None
    return Taxonomy(compute, entries, _effects(entries))


def _loss_at(compute: float, means: Sequence[tuple[float, float]]) -> float:
    macs, losses = np.log(np.array(means, dtype=float)).T
    return math.exp(np.interp(math.log(compute), macs, losses))


def _exponents(curve: Curve) -> dict[str, float]:
    """The exponents of a curve's widest model; none where its family is not registered here."""
    model = curve.best[-1].run.model
    try:
        found = structure(curve.structure, model.width, model.expansion * model.width)
    except ValueError:
        return {}
    return {name: getattr(found, name) for name in EXPONENTS}


def _effects(entries: Sequence[Entry]) -> ExponentEffects | None:
    dense = next((own.loss for own in entries if own.curve.structure == DENSE), None)
    if dense is None:
        return None
    psi, nu, omega = ([own.exponents[name] for own in entries] for name in ("psi", "nu", "omega"))
    return exponent_effects(psi, nu, omega, [own.loss for own in entries], dense)
