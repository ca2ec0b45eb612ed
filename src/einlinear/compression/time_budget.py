"""Budget of time: the seconds of a few structures of every size are measured on this machine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from einlinear.compression.allocation import allocate, least_cost
from einlinear.compression.budget import Allocation, Budget, Candidates, Choice, total_change
from einlinear.compression.candidates import LayerCandidate
from einlinear.compression.compression_report import DtypeAlone, MeasuredTime
from einlinear.compression.layer_timing import describe_tokens, narrowed_label
from einlinear.compression.narrowing import ModuleCandidate, NarrowCandidate, narrow_layer, narrow_size
from einlinear.compression.resume_cache import ResumeCache
from einlinear.compression.sensitivity import Sensitivity
from einlinear.conversion.replacement import structured_like
from einlinear.structures import Structure

# members of a family, and narrow layers, that are timed for every size; the seconds of others are interpolated
_TIMED = 4
# allocations after which the structures chosen are timed themselves
_ROUNDS = 3
T = TypeVar("T")
# costs of a layer by spec, given its name
_Costs = Callable[[str], Mapping[str, int]]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TimeBudget(Budget):
    """A budget of whole nanoseconds for a number of tokens at once, measured for a few structures of every size."""

    count = "time"

    @staticmethod
    def check_options(families: Sequence[str], tokens: int | None, only_if_faster: bool) -> None:
        if tokens is None:
            raise ValueError("count='time' needs tokens: the number in one call, such as 1 for decoding, or 32 * 64")

    def measure_costs(self) -> None:
        """Time the dense layers, and a few structures of every size."""
        for name in self._layers:
            self._seconds(name)

    def costs(self, name: str) -> dict[str, int]:
        """Return the nanoseconds of a layer, "dense" and by spec: measured ones, and for the others interpolated."""
        costs = self._measured_costs(name)
        for family in self.members[name].values():
            costs |= _interpolated(family, costs)
        return costs

    def allocate(self, candidates: Candidates, modules: Sequence[ModuleCandidate], cache: ResumeCache) -> Allocation:
        """Choose one candidate per layer among those faster than dense, and list the layers that have none.

        The structures and narrow layers chosen are timed themselves, and the choice is made again; at last, of timed
        ones alone.
        """
        self._time(_evenly_spaced_sizes(modules))
        if modules:
            self.check(least_cost(self._faster(candidates, self.costs), self._faster_modules(modules)))
        for _ in range(_ROUNDS):
            chosen = self._within(self._faster(candidates, self.costs), self._faster_modules(modules))
            untimed = [(name, c) for name, c in chosen.items() if self._label(name, c) not in self._seconds(name)]
            if not untimed:
                break
            self._time(untimed)
        else:
            timed = [m for m in modules if all(self._label(n, c) in self._seconds(n) for n, c in m.items())]
            chosen = self._within(self._faster(candidates, self._measured_costs), self._faster_modules(timed))
        options = self._faster(candidates, self.costs)
        narrow = {name for name, c in chosen.items() if isinstance(c, NarrowCandidate)}
        slow = [name for name, of in options.items() if len(of) == 1 < len(candidates[name])]
        return chosen, [name for name in slow if name not in narrow]

    def alternatives(
        self, candidates: Candidates, chosen: Choice, sensitivities: Mapping[str, Sensitivity]
    ) -> dict[str, Any]:
        alone = []
        for dtype in _DTYPES:
            converted = [name for name, layer in self._layers.items() if dtype in _other_dtypes(layer)]
            seconds = sum(self._seconds(n)[f"dense, {dtype}" if n in converted else "dense"] for n in self._layers)
            change = sum(sensitivities[name].at(_rounding_error(dtype)) for name in converted)
            if converted:
                alone.append(DtypeAlone(str(dtype), seconds, change))
        before, after = 1e-9 * self.total, 1e-9 * sum(c.cost for c in chosen.values())
        return {"time": MeasuredTime(self._timer.tokens[0], before, after, total_change(chosen), tuple(alone))}

    def _describe(self) -> str:
        return f"time of {len(self._layers)} layers for {describe_tokens(self._timer.tokens)}"

    def _within(self, candidates: Candidates, modules: Sequence[ModuleCandidate]) -> dict[str, LayerCandidate]:
        # measured ones may take longer than was estimated
        return allocate(candidates, max(self.largest, least_cost(candidates, modules)), modules)

    def _faster(self, candidates: Candidates, costs: _Costs) -> dict[str, list[LayerCandidate]]:
        """Return the candidates that have a cost and are faster than the dense layer, with these costs."""
        result = {}
        for name, options in candidates.items():
            of = costs(name)
            priced = [replace(c, cost=of[c.spec]) for c in options if c.spec in of]
            result[name] = [c for c in priced if c.spec == "dense" or c.cost < of["dense"]]
        return result

    def _faster_modules(self, modules: Sequence[ModuleCandidate]) -> list[ModuleCandidate]:
        """Return the modules, with their costs, whose layers together are faster than the dense ones.

        The cost of a narrow layer is measured, or interpolated by its share of the features.
        """
        import numpy as np

        points: dict[str, dict[float, float]] = {}
        for module in modules:
            for name, c in module.items():
                seconds = self._seconds(name)
                of_layer = points.setdefault(name, {1.0: seconds["dense"]})
                if (label := self._label(name, c)) in seconds:
                    of_layer[c.share] = seconds[label]
        shares = {name: sorted(of_layer) for name, of_layer in points.items()}
        result: list[ModuleCandidate] = []
        for module in modules:
            costs = {}
            for name, c in module.items():
                seconds_of = [points[name][share] for share in shares[name]]
                costs[name] = round(1e9 * float(np.interp(c.share, shares[name], seconds_of)))
            if sum(costs.values()) < sum(map(self.dense_cost, module)):
                result.append({name: replace(c, cost=costs[name]) for name, c in module.items()})
        return result

    def _label(self, name: str, candidate: LayerCandidate) -> str:
        """Return the label under which the layer of a candidate is timed."""
        if not isinstance(candidate, NarrowCandidate):
            return candidate.spec
        return narrowed_label(*narrow_size(self._layers[name], candidate))

    def _time(self, chosen: Iterable[tuple[str, LayerCandidate]]) -> None:
        """Time the layers of candidates, those of one size in the same rounds of calls."""
        by_size: dict[str, tuple[str, dict[str, Callable[[], nn.Module]]]] = {}
        for name, candidate in chosen:
            layer, label = self._layers[name], self._label(name, candidate)
            build: Callable[[], nn.Module] = partial(structured_like, layer, candidate.spec)
            if isinstance(candidate, NarrowCandidate):
                build = partial(narrow_layer, layer, candidate)
            if label != "dense":
                by_size.setdefault(self._timer.size(layer), (name, {}))[1][label] = build
        for name, new in by_size.values():
            self._timer.seconds(self._layers[name], new, *self._timer.tokens)

    def _measured_costs(self, name: str) -> dict[str, int]:
        seconds = self._seconds(name)
        return {s.spec: round(1e9 * seconds[s.spec]) for s in self._structures(name) if s.spec in seconds}

    def _seconds(self, name: str) -> dict[str, float]:
        """Return the seconds of all that was timed for a layer's size, at least those of a few members and dtypes."""
        layer = self._layers[name]
        families = (sorted(family, key=lambda s: s.macs) for family in self.members[name].values())
        specs = [s.spec for family in families for s in _evenly_spaced(family)]
        new: dict[str, Callable[[], nn.Module]] = {spec: partial(structured_like, layer, spec) for spec in specs}
        new |= {f"dense, {dtype}": partial(_converted, layer, dtype) for dtype in _other_dtypes(layer)}
        return self._timer.seconds(layer, new, *self._timer.tokens)


def _evenly_spaced(ordered: Sequence[T]) -> list[T]:
    """Return a few items from the first to the last."""
    count = min(_TIMED, len(ordered))
    return [ordered[round(i * (len(ordered) - 1) / max(count - 1, 1))] for i in range(count)]


def _evenly_spaced_sizes(modules: Sequence[ModuleCandidate]) -> list[tuple[str, NarrowCandidate]]:
    """Return a few narrow candidates of every layer, with its name, from the narrowest to the widest."""
    by_name: dict[str, list[NarrowCandidate]] = {}
    for module in modules:
        for name, candidate in module.items():
            by_name.setdefault(name, []).append(candidate)
    ordered = {name: sorted(candidates, key=lambda c: c.share) for name, candidates in by_name.items()}
    return [(name, c) for name, candidates in ordered.items() for c in _evenly_spaced(candidates)]


def _interpolated(family: Sequence[Structure], costs: Mapping[str, int]) -> dict[str, int]:
    """Return the costs of the members that were not measured: linear between two, and never falling with MACs."""
    import numpy as np

    measured = sorted((s.macs, costs[s.spec]) for s in family if s.spec in costs)
    if not measured:
        return {}
    others = [s for s in family if s.spec not in costs]
    macs, times = zip(*measured, strict=True)
    # noise only adds time: a member takes no longer than one of more MACs
    rising = np.minimum.accumulate(times[::-1])[::-1]
    estimates = np.interp([s.macs for s in others], macs, rising)
    return {s.spec: round(float(t)) for s, t in zip(others, estimates, strict=True)}


def _other_dtypes(layer: Any) -> list[torch.dtype]:
    return [dtype for dtype in _DTYPES if dtype != layer.weight.dtype]


def _converted(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(layer).to(dtype)


def _rounding_error(dtype: torch.dtype) -> float:
    """Return the relative squared error of outputs whose weight and inputs are rounded to a dtype."""
    return 2 * torch.finfo(dtype).eps ** 2 / 16
