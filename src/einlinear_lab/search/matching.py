"""Width and rank for a budget: every structure gets the model that costs the same, or it is said that there is none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, lru_cache
from itertools import product
from typing import Any

import torch

from einlinear.nn import Linear
from einlinear.ops.projection.unfold import is_padded
from einlinear.structures import DoesNotFit, Structure, structure
from einlinear_lab.models import ReferenceModel
from einlinear_lab.runs.models import Model, Shape
from einlinear_lab.search.space import Proposals

TOLERANCE = 0.05  # of the budget
_WIDEST = 2**14
_FIRST, _STEPS = 32, 4  # the width that is tried first, in steps, and how often it is corrected
_NEAR, _FAR = 1.08, 4.0  # factors on the width where costs cross the budget: how far is looked, and if nothing fits
_LOOKED_AT = 200  # widths, at most
_MARK = "low_rank(rank={})"  # tells which layers take a structure

Made = tuple[Structure, ...]  # of all kinds of layers
Ranks = Mapping[str, Fraction]  # exponents, by the option of the model


@dataclass(frozen=True)
class Matched:
    """A structure at the size that fits a budget.

    Attributes:
        specs: the structures, by the option of the model.
        width: of the model.
        macs: of the model, for one input.
        sizes: in_features, out_features and the sizes of all axes, for each kind of layer by its option: two
            candidates of the same sizes are the same model.
        params: of the structured layers, biases left out.
    """

    specs: Mapping[str, str]
    width: int
    macs: int
    sizes: tuple[tuple[str, tuple[int, ...]], ...]
    params: int


@dataclass(frozen=True)
class Matching:
    """Models of one kind, for one kind of data, at one budget.

    Attributes:
        model: its structure and width are chosen.
        shape: of the data.
        budget: multiply-accumulates for one input.
        granule: widths are its multiples, and those of the heads; odd ones factor badly.
    """

    model: Model
    shape: Shape
    budget: int
    granule: int = 2

    def match(self, proposals: Proposals) -> Matched:
        """The width, and the ranks nearest to those proposed, at which the model costs the budget within 5 %.

        Raises:
            DoesNotFit: there are none; it says how close one comes.
        """
        nearest = math.inf
        for reach, ranks in product((_NEAR, _FAR), _ranks(proposals)):
            padded: Matched | None = None
            for width in self._widths(proposals, ranks, reach):
                if (made := self._made(proposals, ranks, width)) is None:
                    continue
                macs = self._costs_of(proposals).macs(made, width)
                off = abs(macs / self.budget - 1)
                nearest = min(nearest, off)
                if off <= TOLERANCE and not any(is_padded(s, term) for s in made for term in s.terms):
                    return self._matched(proposals, made, width, macs)
                if off <= TOLERANCE:
                    padded = padded or self._matched(proposals, made, width, macs)
            if padded:
                return padded
        closest = f"the closest is {nearest:.0%} off" if nearest < math.inf else "it fits no width"
        step = self._costs_of(proposals).step
        names = " with ".join(own.spec(own.ranks[0], step) for own in proposals.values())
        raise DoesNotFit(f"no {names} is within {TOLERANCE:.0%} of {self.budget:,} MACs: {closest}")

    def _matched(self, proposals: Proposals, made: Made, width: int, macs: int) -> Matched:
        layers = self._costs_of(proposals).layers
        specs = {
            option: next(s.spec for layer, s in zip(layers, made, strict=True) if layer.option == option)
            for option in proposals
        }
        sizes = tuple(
            (layer.option, (s.in_features, s.out_features, *(size for _, size in s.sizes)))
            for layer, s in zip(layers, made, strict=True)
        )
        params = sum(layer.count * s.params for layer, s in zip(layers, made, strict=True))
        return Matched(specs, width, macs, sizes, params)

    def _made(self, proposals: Proposals, ranks: Ranks, width: int) -> Made | None:
        """The structures of all kinds of layers."""
        specs = {option: own.spec(ranks[option], width) for option, own in proposals.items()}
        try:
            layers = self._costs_of(proposals).layers
            return tuple(_structure(specs[layer.option], *layer.at(width)) for layer in layers)
        except DoesNotFit:
            return None

    def _widths(self, proposals: Proposals, ranks: Ranks, reach: float) -> Iterator[int]:
        """Those around which costs cross the budget, from there outwards; they grow like a power, by and large."""
        step, power = self._costs_of(proposals).step, 1.5
        steps, before = _FIRST, None
        for _ in range(_STEPS):
            if (cost := self._cost(proposals, ranks, steps)) is None:
                return
            if before is not None and before[0] != steps and before[1] != cost:
                power = min(2.0, max(0.5, math.log(cost / before[1]) / math.log(steps / before[0])))
            before = steps, cost
            steps = min(_WIDEST // step, max(1, round(steps * (self.budget / cost) ** (1 / power))))
        down, up = (max(2, math.ceil(steps * share)) for share in (1 - 1 / reach, reach - 1))
        first, last = max(1, steps - down), min(_WIDEST // step, steps + up)
        found = {*range(first, last + 1)}
        if len(found) > _LOOKED_AT:  # evenly in the logarithm, as costs grow
            found = {round(first * (last / first) ** (i / _LOOKED_AT)) for i in range(_LOOKED_AT + 1)}
        for n in sorted(found, key=lambda n: abs(n - steps)):
            yield n * step

    def _cost(self, proposals: Proposals, ranks: Ranks, steps: int) -> int | None:
        """What the first of a few widths that fits costs."""
        costs = self._costs_of(proposals)
        for n in range(steps, steps + 8):
            if made := self._made(proposals, ranks, n * costs.step):
                return costs.macs(made, n * costs.step)
        return None

    def _costs_of(self, proposals: Proposals) -> _Costs:
        return _costs(self.model, self.shape, self.granule, tuple(proposals))


def _ranks(proposals: Proposals) -> Iterator[Ranks]:
    """The exponents of the ranks, those proposed first, and from there step by step away from all of them."""
    every = {option: own.ranks for option, own in proposals.items()}
    for n in range(max(map(len, every.values()))):
        yield {option: ranks[min(n, len(ranks) - 1)] for option, ranks in every.items()}


@dataclass(frozen=True)
class _Layer:
    """Layers of one shape that take the structure of an option; features are slope * width + constant."""

    option: str
    in_features: tuple[int, int]
    out_features: tuple[int, int]
    count: int

    def at(self, width: int) -> tuple[int, int]:
        (a, b), (c, d) = self.in_features, self.out_features
        return a * width + b, c * width + d


@dataclass(frozen=True)
class _Costs:
    """What a model costs by width, without building it for each: from three that are built.

    Attributes:
        step: of the widths that it can have.
        positions: of an input, such as the patches of an image, that every one of these layers is applied to.
        layers: that take the structure.
        rest: what else it costs, a + b width + c width^2.
    """

    step: int
    positions: int
    layers: tuple[_Layer, ...]
    rest: tuple[Fraction, Fraction, Fraction]

    @classmethod
    def of(cls, model: Model, shape: Shape, granule: int, options: tuple[str, ...]) -> _Costs:
        if model.experts is not None:
            raise ValueError("a search has no mixtures of experts: leave out experts")
        if unknown := [option for option in options if not hasattr(model, option)]:
            raise ValueError(f"model={model.NAME} has no {', '.join(unknown)}")
        heads, d_head = getattr(model, "heads", None), getattr(model, "d_head", None)
        step = math.lcm(granule, (d_head or 1) if heads is None else heads if d_head is None else 1)
        widths = [n * step for n in (4, 8, 12)]
        once = {option: _MARK.format(n) for n, option in enumerate(options, 1)}
        twice = {option: _MARK.format(2 * n) for n, option in enumerate(options, 1)}
        built = [_build(at(model, width, once), shape) for width in widths]
        kinds = [_marked(one, once) for one in built]
        lines = [
            (option, _line(widths, [kind[name][1] for kind in kinds]), _line(widths, [kind[name][2] for kind in kinds]))
            for name, (option, *_) in kinds[0].items()
        ]
        layers = tuple(_Layer(*line, lines.count(line)) for line in dict.fromkeys(lines))
        if unused := set(options) - {layer.option for layer in layers}:
            raise ValueError(f"no layer of model={model.NAME} takes {', '.join(sorted(unused))}: name fewer roles")

        def own(marks: Mapping[str, str], width: int) -> int:
            return sum(layer.count * structure(marks[layer.option], *layer.at(width)).macs for layer in layers)

        dearer = _build(at(model, widths[-1], twice), shape)
        positions, left = divmod(dearer.macs - built[-1].macs, own(twice, widths[-1]) - own(once, widths[-1]))
        if left:
            raise ValueError(f"the layers of model={model.NAME} are applied to different numbers of positions")
        others = [one.macs - positions * own(once, width) for one, width in zip(built, widths, strict=True)]
        return cls(step, positions, layers, _parabola(widths, others))

    def macs(self, made: Made, width: int) -> int:
        a, b, c = self.rest
        own = sum(layer.count * s.macs for layer, s in zip(self.layers, made, strict=True))
        return self.positions * own + int(a + b * width + c * width**2)


@cache
def _costs(model: Model, shape: Shape, granule: int, options: tuple[str, ...]) -> _Costs:
    return _Costs.of(model, shape, granule, options)


@lru_cache(maxsize=2**16)
def _structure(spec: str, in_features: int, out_features: int) -> Structure:
    return structure(spec, in_features, out_features)


def at(model: Model, width: int, specs: Mapping[str, str]) -> Model:
    """A model of another width, with structures by option."""
    changes: dict[str, Any] = {"width": width, **specs}
    return replace(model, **changes)


def _build(model: Model, shape: Shape) -> ReferenceModel:
    with torch.device("meta"):
        return model.build(shape)


def _marked(model: ReferenceModel, marks: Mapping[str, str]) -> dict[str, tuple[str, int, int]]:
    """The option and the sizes of the layers that take a structure, by name."""
    options = {mark: option for option, mark in marks.items()}
    return {
        name: (options[layer.structure.spec], layer.in_features, layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, Linear) and layer.structure.spec in options
    }


def _line(widths: list[int], features: list[int]) -> tuple[int, int]:
    """Slope and constant of the features over the width."""
    slope = (features[1] - features[0]) // (widths[1] - widths[0])
    constant = features[0] - slope * widths[0]
    if any(slope * width + constant != own for width, own in zip(widths, features, strict=True)):
        raise ValueError(f"layers whose features are no linear function of the width cannot be matched: {features}")
    return slope, constant


def _parabola(xs: list[int], ys: list[int]) -> tuple[Fraction, Fraction, Fraction]:
    """a, b and c of the a + b x + c x^2 through three equidistant points."""
    step = xs[1] - xs[0]
    c = Fraction(ys[2] - 2 * ys[1] + ys[0], 2 * step**2)
    b = Fraction(ys[1] - ys[0], step) - c * (xs[0] + xs[1])
    return ys[0] - b * xs[0] - c * xs[0] ** 2, b, c
