"""Candidates for each layer: members of families of structures, and the errors that they would leave.

One spectrum yields the errors of low rank. Those of another family are a multiple of them that changes slowly with the
size: it is measured for a few members, which are fitted to the layer, and interpolated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from einlinear.compression.calibration import InputStatistics
from einlinear.compression.expert_stacks import layer_weight
from einlinear.compression.output_metric import OutputMetric, dense_weights, fit_metric, project_in_metric
from einlinear.compression.spectrum import NO_ERROR, LowRanks, Spectrum, between
from einlinear.nn.dense_layers import features
from einlinear.structures import DoesNotFit, Structure, structure
from einlinear.structures.spec import OverBudget

DEFAULT_FAMILIES = ("low_rank", "monarch", "btt", "blast(blocks=4)")
# of the dense MACs of a layer
_FRACTIONS = tuple(n / 40 for n in range(2, 39))
# shares of the dense parameters at which every family is fitted, and those at which only the best one is
_MIDDLE, _OTHERS = (0.5,), (0.25, 0.75)
# steps of these fits: those of more steps leave less, but by about as much for every layer
_STEPS = 20


@dataclass(frozen=True)
class LayerCandidate:
    """A structure for one layer, or "dense", with the error of the layer's outputs and the change of the model's.

    An empty precision is the dtype of the dense layer.
    """

    spec: str
    cost: int
    error: float
    output_change: float
    precision: str = ""

    @property
    def structure(self) -> str:
        """What the report calls the structure."""
        return self.spec

    @property
    def label(self) -> str:
        """The structure, and the precision if it is quantised."""
        return f"{self.structure}, {self.precision}" if self.precision else self.structure


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


def reason_for_none(families: Iterable[str], in_features: int, out_features: int) -> str:
    """Return why no family has a member of a size."""
    reasons = []
    for family in families:
        reasons.append(f"{family} saves nothing")
        try:
            with suppress(OverBudget):
                structure(family, in_features, out_features, max_macs=1.0)
        except DoesNotFit as error:
            reasons[-1] = str(error)
    return f"no structure fits {in_features} -> {out_features}: {'; '.join(reasons)}"


def structure_errors(
    layer: Any,
    families: Mapping[str, Sequence[Structure]],
    get_metric: Callable[[], OutputMetric | None],
    components: Callable[[InputStatistics, Tensor], LowRanks],
    cached: Callable[..., Any],
) -> list[tuple[Structure, float]]:
    """Return "dense" and the members of families, with the errors of the layer's outputs that they leave.

    `cached(content, compute, decode)` reads a result, or computes it from the layer's inputs and their second moment.
    """
    weight = layer_weight(layer)

    def compute_spectrum(statistics: InputStatistics, moment: Tensor) -> dict[str, Any]:
        *_factors, energies = components(statistics, moment)
        return asdict(Spectrum.of(weight, energies))

    spectrum = cached("spectrum", compute_spectrum, Spectrum.from_record)

    def errors_at(family: str, shares: Sequence[float]) -> dict[str, float]:
        if not (fitted := members_to_fit(families[family], shares)):
            return {}
        compute = partial(fitted_errors, fitted, layer, get_metric)
        key, specs = f"errors of {family} at {shares}", [s.spec for s in fitted]
        return dict(cached(key, compute, lambda record: {spec: float(record[spec]) for spec in specs}))

    errors = {family: errors_at(family, _MIDDLE) for family in families}
    multiples = {
        family: error / max(spectrum.at(_share(s)), NO_ERROR)
        for family, structures in families.items()
        for s in structures
        if (error := errors[family].get(s.spec)) is not None
    }
    # the family that probably wins is worth more fits
    if multiples and multiples[best := min(multiples, key=multiples.__getitem__)] < 1:
        errors[best] |= errors_at(best, _OTHERS)
    result = [(structure("dense", *features(layer)), 0.0)]
    for family, structures in families.items():
        result += zip(structures, estimated_errors(structures, errors[family], spectrum).values(), strict=True)
    return result


def members_to_fit(considered: Sequence[Structure], shares: Sequence[float]) -> list[Structure]:
    """Return the members with about these shares of the parameters, whose errors are measured; none for low rank.

    The errors of the others are interpolated, or for low rank known.
    """
    shares = () if all(map(_is_low_rank, considered)) else shares
    return list(dict.fromkeys(min(considered, key=lambda s: abs(_share(s) - share)) for share in shares))


@torch.no_grad()
def fitted_errors(
    structures: Sequence[Structure],
    layer: Any,
    get_metric: Callable[[], OutputMetric | None],
    statistics: InputStatistics,
    moment: Tensor,
) -> dict[str, float]:
    """Fit structures to a layer, and return their relative squared errors by spec."""
    weight, metric = layer_weight(layer), fit_metric(statistics, get_metric)
    fits = ((s, project_in_metric(s, weight, moment, metric, _STEPS)) for s in structures)
    return {s.spec: statistics.relative_error(weight, dense_weights(s, factors)) for s, factors in fits}


def estimated_errors(
    considered: Sequence[Structure], errors: Mapping[str, float], spectrum: Spectrum
) -> dict[str, float]:
    """Return the errors of all members by spec: some are fitted, the others are interpolated."""
    fitted = sorted((_share(s), errors[s.spec]) for s in considered if s.spec in errors)
    # without any, they are all of low rank
    fitted = fitted or [(1.0, spectrum.at(1.0))]
    # without parameters all families have the same error
    shares = [0.0, *(share for share, _ in fitted)]
    multiples = [1.0, *(max(error, NO_ERROR) / max(spectrum.at(share), NO_ERROR) for share, error in fitted)]

    def estimate(share: float) -> float:
        return min(between(share, shares, multiples) * max(spectrum.at(share), NO_ERROR), 1.0)

    return {s.spec: errors[s.spec] if s.spec in errors else estimate(_share(s)) for s in considered}


def _is_low_rank(s: Structure) -> bool:
    return len(s.terms) == 1 and len(s.factors) == 2 and not any(f.batch or f.free for f in s.terms[0].factors)


def _share(s: Structure) -> float:
    return s.params / (s.in_features * s.out_features)
