"""Matched compute: the width and rank at which a model with a structure costs a budget of MACs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, cached_property, lru_cache
from itertools import product
from typing import Any

import torch

from einlinear.nn import Linear
from einlinear.structures import DoesNotFit, Structure, structure
from einlinear_lab.models import ReferenceModel
from einlinear_lab.models.config import ModelConfig, Shape
from einlinear_lab.search.space import STRUCTURE, Proposals

# Relative to the budget.
TOLERANCE = 0.05
_WIDEST, _MOST_WIDTHS = 2**14, 200
# The first width to be tried, in steps, and the number of corrections after it.
_FIRST, _CORRECTIONS = 32, 4
# Factors on the estimated width: the range that is searched first, and the range that is searched if nothing fits.
_NEAR, _FAR = 1.08, 4.0
_structure = lru_cache(maxsize=2**16)(structure)

# By the option of the model.
Ranks = Mapping[str, Fraction]
# One for each kind of layer.
Structures = tuple[Structure, ...]


@dataclass(frozen=True)
class Architecture:
    """Structures (by the option of the model) and the width of a model that costs the budget."""

    specs: Mapping[str, str]
    width: int
    # for one input
    macs: int
    # for each kind of layer its option, and in_features, out_features and the sizes of all axes
    sizes: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def spec(self) -> str:
        """The structure of the layers whose role has no structure of its own."""
        return self.specs[STRUCTURE]

    @cached_property
    def signature(self) -> str:
        """Equal for architectures that are the same model."""
        # all einsums have one pattern, so that their sizes tell them apart
        kinds = {option: "einsum" if spec.startswith("einsum") else spec for option, spec in self.specs.items()}
        # tuples that were stored come back as lists, and are the same JSON
        return json.dumps([kinds, self.sizes])

    @property
    def exponents(self) -> tuple[float, float, float]:
        """psi, nu and omega of `spec` in the first layer that has it."""
        in_features, out_features, *_ = next(sizes for option, sizes in self.sizes if option == STRUCTURE)
        s = _structure(self.spec, in_features, out_features)
        return s.psi, s.nu, s.omega

    def model(self, base: ModelConfig) -> ModelConfig:
        return with_structures(base, self.width, self.specs)


def with_structures(model: ModelConfig, width: int, specs: Mapping[str, str]) -> ModelConfig:
    """Return a model of another width, with structures by option."""
    changes: dict[str, Any] = {"width": width, **specs}
    return replace(model, **changes)


@dataclass(frozen=True)
class Matching:
    """Models of one kind, for one kind of data, at one budget of multiply-accumulates for one input."""

    model: ModelConfig
    shape: Shape
    budget: int
    # widths are multiples of it, and of the number of heads; odd widths factor badly
    granule: int = 2

    def match(self, proposals: Proposals) -> Architecture:
        """Return the model within 5 % of the budget at the ranks nearest to the proposed ones, if possible unpadded."""
        costs = _costs(self.model, self.shape, self.granule, tuple(proposals))
        distances = [math.inf]
        for reach, ranks in product((_NEAR, _FAR), _ranks(proposals)):
            padded: Architecture | None = None
            for width in self._widths(costs, proposals, ranks, reach):
                if (structures := costs.structures(proposals, ranks, width)) is None:
                    continue
                distances.append(abs(costs.macs(structures, width) / self.budget - 1))
                if distances[-1] > TOLERANCE:
                    continue
                if not any(s.is_padded for s in structures):
                    return costs.architecture(structures, width)
                padded = padded or costs.architecture(structures, width)
            if padded:
                return padded
        nearest = f"the closest is {min(distances):.0%} off" if distances[1:] else "it fits no width"
        names = " with ".join(proposal.spec(proposal.ranks[0], costs.step) for proposal in proposals.values())
        raise DoesNotFit(f"no {names} is within {TOLERANCE:.0%} of {self.budget:,} MACs: {nearest}")

    def _widths(self, costs: _Costs, proposals: Proposals, ranks: Ranks, reach: float) -> Iterator[int]:
        """Yield widths from the one at which costs cross the budget outwards. Costs grow roughly like a power."""
        largest, power = _WIDEST // costs.step, 1.5
        steps, previous = _FIRST, None
        for _ in range(_CORRECTIONS):
            if (macs := costs.first(proposals, ranks, steps)) is None:
                return
            if previous is not None and previous[0] != steps and previous[1] != macs:
                power = min(2.0, max(0.5, math.log(macs / previous[1]) / math.log(steps / previous[0])))
            previous = steps, macs
            steps = min(largest, max(1, round(steps * (self.budget / macs) ** (1 / power))))
        down, up = (max(2, math.ceil(steps * share)) for share in (1 - 1 / reach, reach - 1))
        first, last = max(1, steps - down), min(largest, steps + up)
        candidates = {*range(first, last + 1)}
        if len(candidates) > _MOST_WIDTHS:
            candidates = {round(first * (last / first) ** (i / _MOST_WIDTHS)) for i in range(_MOST_WIDTHS + 1)}
        for n in sorted(candidates, key=lambda n: abs(n - steps)):
            yield n * costs.step


def _ranks(proposals: Proposals) -> Iterator[Ranks]:
    """Yield the exponents of the ranks: the proposed ones first, then all of them farther and farther away."""
    ranks = {option: proposal.ranks for option, proposal in proposals.items()}
    for n in range(max(map(len, ranks.values()))):
        yield {option: values[min(n, len(values) - 1)] for option, values in ranks.items()}


@dataclass(frozen=True)
class _Layer:
    """Layers of one shape that take the structure of an option. Features are constant + slope * width."""

    option: str
    in_features: tuple[int, int]
    out_features: tuple[int, int]
    count: int

    def structure(self, spec: str, width: int) -> Structure:
        (a, b), (c, d) = self.in_features, self.out_features
        return _structure(spec, a + b * width, c + d * width)


@dataclass(frozen=True)
class _Costs:
    """MACs of a model whose width is a multiple of a step, extrapolated from three models that are built."""

    step: int
    # of an input, such as the patches of an image, that each of these layers is applied to
    positions: int
    layers: tuple[_Layer, ...]
    # MACs of all other layers: the coefficients of a polynomial in the width
    rest: tuple[Fraction, ...]

    def structures(self, proposals: Proposals, ranks: Ranks, width: int) -> Structures | None:
        """Return the structures of all kinds of layers; None where one does not fit."""
        specs = {option: proposal.spec(ranks[option], width) for option, proposal in proposals.items()}
        try:
            return tuple(layer.structure(specs[layer.option], width) for layer in self.layers)
        except DoesNotFit:
            return None

    def macs(self, structures: Structures, width: int) -> int:
        structured = sum(layer.count * s.macs for layer, s in zip(self.layers, structures, strict=True))
        return self.positions * structured + int(sum(c * width**n for n, c in enumerate(self.rest)))

    def first(self, proposals: Proposals, ranks: Ranks, steps: int) -> int | None:
        """Return the MACs at the first of a few widths that fits."""
        for width in range(steps * self.step, (steps + 8) * self.step, self.step):
            if structures := self.structures(proposals, ranks, width):
                return self.macs(structures, width)
        return None

    def architecture(self, structures: Structures, width: int) -> Architecture:
        layers = [(layer.option, s) for layer, s in zip(self.layers, structures, strict=True)]
        specs = {option: s.spec for option, s in reversed(layers)}
        specs = dict(sorted(specs.items(), key=lambda item: item[0] != STRUCTURE))
        sizes = tuple((option, (s.in_features, s.out_features, *(size for _, size in s.sizes))) for option, s in layers)
        return Architecture(specs, width, self.macs(structures, width), sizes)


@cache
def _costs(model: ModelConfig, shape: Shape, granule: int, options: tuple[str, ...]) -> _Costs:
    if model.experts is not None:
        raise ValueError("a search has no mixtures of experts: leave out experts")
    if unknown := [option for option in options if not hasattr(model, option)]:
        raise ValueError(f"model={model.NAME} has no {', '.join(unknown)}")
    heads, d_head = getattr(model, "heads", None), getattr(model, "d_head", None)
    step = math.lcm(granule, (d_head or 1) if heads is None else heads if d_head is None else 1)
    widths = [n * step for n in (4, 8, 12)]
    # a rank of its own marks the layers of an option
    marks, doubled = ({option: f"low_rank(rank={k * n})" for n, option in enumerate(options, 1)} for k in (1, 2))
    models = [_build(with_structures(model, width, marks), shape) for width in widths]
    options_of_marks = {mark: option for option, mark in marks.items()}
    shapes = []
    linear_layers = ([layer for layer in one.modules() if isinstance(layer, Linear)] for one in models)
    for same in zip(*linear_layers, strict=True):
        if option := options_of_marks.get(same[0].structure.spec):
            in_features = _linear(widths, [layer.in_features for layer in same])
            shapes.append((option, in_features, _linear(widths, [layer.out_features for layer in same])))
    layers = tuple(_Layer(*shape, shapes.count(shape)) for shape in dict.fromkeys(shapes))
    if unused := set(options) - {layer.option for layer in layers}:
        raise ValueError(f"no layer of model={model.NAME} takes {', '.join(sorted(unused))}: name fewer roles")

    def macs(specs: Mapping[str, str], width: int) -> int:
        return sum(layer.count * layer.structure(specs[layer.option], width).macs for layer in layers)

    # Twice the rank costs twice the MACs of these layers at every position.
    more = _build(with_structures(model, widths[-1], doubled), shape).macs - models[-1].macs
    positions, remainder = divmod(more, macs(doubled, widths[-1]) - macs(marks, widths[-1]))
    if remainder:
        raise ValueError(f"the layers of model={model.NAME} are applied to different numbers of positions")
    rest = [one.macs - positions * macs(marks, width) for one, width in zip(models, widths, strict=True)]
    return _Costs(step, positions, layers, _parabola(widths, rest))


def _build(model: ModelConfig, shape: Shape) -> ReferenceModel:
    with torch.device("meta"):
        return model.build(shape)


def _linear(widths: list[int], features: list[int]) -> tuple[int, int]:
    constant, slope, quadratic = _parabola(widths, features)
    if quadratic or any(c.denominator > 1 for c in (constant, slope)):
        raise ValueError(f"layers whose features are no linear function of the width cannot be matched: {features}")
    return int(constant), int(slope)


def _parabola(xs: list[int], ys: list[int]) -> tuple[Fraction, ...]:
    """Return a, b and c of a + b x + c x^2 through three equidistant points."""
    step = xs[1] - xs[0]
    c = Fraction(ys[2] - 2 * ys[1] + ys[0], 2 * step**2)
    b = Fraction(ys[1] - ys[0], step) - c * (xs[0] + xs[1])
    return ys[0] - b * xs[0] - c * xs[0] ** 2, b, c
