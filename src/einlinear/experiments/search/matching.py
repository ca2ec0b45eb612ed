"""Width and rank for a budget: every structure gets the model that costs the same, or it is said that there is none."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache

import torch

from einlinear.experiments.runs.models import Model, Shape
from einlinear.experiments.search.space import Proposal
from einlinear.nn import Linear, ReferenceModel
from einlinear.ops.projection.unfold import is_padded
from einlinear.structures import DoesNotFit, Structure, structure

TOLERANCE = 0.05  # of the budget
_WIDEST = 2**14
_FIRST, _STEPS = 32, 4  # the width that is tried first, in steps, and how often it is corrected
_NEIGHBOURS = 0.08  # of the width: how far from where costs cross the budget widths are looked at
_MARK, _TWICE = "low_rank(rank=1)", "low_rank(rank=2)"  # tell which layers take the structure, and how often


@dataclass(frozen=True)
class Matched:
    """A structure at the size that fits a budget.

    Attributes:
        spec: the structure.
        width: of the model.
        macs: of the model, for one input.
        sizes: of all axes, for each kind of layer: two candidates of the same sizes are the same model.
        params: of the structured layers, biases left out.
    """

    spec: str
    width: int
    macs: int
    sizes: tuple[tuple[int, ...], ...]
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

    def match(self, proposal: Proposal) -> Matched:
        """The width, and the rank nearest to the one proposed, at which the model costs the budget within 5 %.

        Raises:
            DoesNotFit: there are none; it says how close one comes.
        """
        nearest = math.inf
        for rho in proposal.ranks:
            padded: Matched | None = None
            for width in self._widths(proposal, rho):
                if (made := self._made(proposal, rho, width)) is None:
                    continue
                macs = self._costs.macs(made, width)
                off = abs(macs / self.budget - 1)
                nearest = min(nearest, off)
                if off <= TOLERANCE and not any(is_padded(s, term) for s in made for term in s.terms):
                    return self._matched(made, width, macs)
                if off <= TOLERANCE:
                    padded = padded or self._matched(made, width, macs)
            if padded:
                return padded
        closest = f"the closest is {nearest:.0%} off" if nearest < math.inf else "it fits no width"
        name = proposal.spec(proposal.ranks[0], self._costs.step)
        raise DoesNotFit(f"no {name} is within {TOLERANCE:.0%} of {self.budget:,} MACs: {closest}")

    def _matched(self, made: tuple[Structure, ...], width: int, macs: int) -> Matched:
        sizes = tuple((s.in_features, s.out_features, *(size for _, size in s.sizes)) for s in made)
        params = sum(layer.count * s.params for layer, s in zip(self._costs.layers, made, strict=True))
        return Matched(made[0].spec, width, macs, sizes, params)

    def _made(self, proposal: Proposal, rho: Fraction, width: int) -> tuple[Structure, ...] | None:
        """The structures of all kinds of layers."""
        try:
            return tuple(_structure(proposal.spec(rho, width), *layer.at(width)) for layer in self._costs.layers)
        except DoesNotFit:
            return None

    def _widths(self, proposal: Proposal, rho: Fraction) -> Iterator[int]:
        """Those around which costs cross the budget, from there outwards; they grow like a power, by and large."""
        step, power = self._costs.step, 1.5
        steps, before = _FIRST, None
        for _ in range(_STEPS):
            if (cost := self._cost(proposal, rho, steps)) is None:
                return
            if before is not None and before[0] != steps and before[1] != cost:
                power = min(2.0, max(0.5, math.log(cost / before[1]) / math.log(steps / before[0])))
            before = steps, cost
            steps = min(_WIDEST // step, max(1, round(steps * (self.budget / cost) ** (1 / power))))
        reach = max(2, math.ceil(steps * _NEIGHBOURS))
        for n in sorted(range(max(1, steps - reach), steps + reach + 1), key=lambda n: abs(n - steps)):
            yield n * step

    def _cost(self, proposal: Proposal, rho: Fraction, steps: int) -> int | None:
        """What the first of a few widths that fits costs."""
        for n in range(steps, steps + 8):
            width = n * self._costs.step
            if made := self._made(proposal, rho, width):
                return self._costs.macs(made, width)
        return None

    @cached_property
    def _costs(self) -> _Costs:
        return _Costs.of(self.model, self.shape, self.granule)


@dataclass(frozen=True)
class _Layer:
    """Layers of one shape that take the structure; features are slope * width + constant."""

    count: int
    in_features: tuple[int, int]
    out_features: tuple[int, int]

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
    def of(cls, model: Model, shape: Shape, granule: int) -> _Costs:
        heads, d_head = getattr(model, "heads", None), getattr(model, "d_head", None)
        step = math.lcm(granule, (d_head or 1) if heads is None else heads if d_head is None else 1)
        widths = [n * step for n in (4, 8, 12)]
        built = [_build(replace(model, structure=_MARK, width=width), shape) for width in widths]
        kinds: list[dict[str, tuple[int, int]]] = [_marked(one) for one in built]
        lines = {
            name: tuple(_line(widths, [kind[name][side] for kind in kinds]) for side in (0, 1)) for name in kinds[0]
        }
        counted = {line: [*lines.values()].count(line) for line in lines.values()}
        layers = tuple(_Layer(count, *line) for line, count in counted.items())
        twice = _build(replace(model, structure=_TWICE, width=widths[0]), shape)
        one_rank = sum(layer.count * structure(_MARK, *layer.at(widths[0])).macs for layer in layers)
        positions, left = divmod(twice.macs - built[0].macs, one_rank)
        if left:
            raise ValueError(f"the layers of model={model.NAME} are applied to different numbers of positions")
        others = []
        for one, width in zip(built, widths, strict=True):
            own = sum(layer.count * structure(_MARK, *layer.at(width)).macs for layer in layers)
            others.append(one.macs - positions * own)
        return cls(step, positions, layers, _parabola(widths, others))

    def macs(self, made: tuple[Structure, ...], width: int) -> int:
        a, b, c = self.rest
        own = sum(layer.count * s.macs for layer, s in zip(self.layers, made, strict=True))
        return self.positions * own + int(a + b * width + c * width**2)


@lru_cache(maxsize=2**16)
def _structure(spec: str, in_features: int, out_features: int) -> Structure:
    return structure(spec, in_features, out_features)


def _build(model: Model, shape: Shape) -> ReferenceModel:
    with torch.device("meta"):
        return model.build(shape)


def _marked(model: ReferenceModel) -> dict[str, tuple[int, int]]:
    """The sizes of the layers that take the structure, by name."""
    return {
        name: (layer.in_features, layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, Linear) and layer.structure.spec == _MARK
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
