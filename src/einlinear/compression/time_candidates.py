"""Candidates of a layer under a budget of time: the seconds of a few structures are measured on this machine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from einlinear.compression.allocation import allocate, least_cost
from einlinear.compression.candidates import LayerCandidate
from einlinear.compression.compression_report import DtypeAlone, MeasuredTime
from einlinear.compression.layer_timing import LayerTimer, describe_tokens
from einlinear.compression.sensitivity import Sensitivity
from einlinear.conversion.replacement import structured_like
from einlinear.structures import Structure

# members of a family that are timed for every size; the seconds of the others are interpolated by MACs
_TIMED = 4
# allocations after which the structures chosen are timed themselves
_ROUNDS = 3
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LayerTimes:
    """Times of layers, dense and in every structure, for a number of tokens; costs are whole nanoseconds.

    Args:
        layers: dense layers by name.
        members: members of each family by layer.
        budget: the fraction of the time of all dense layers together; ValueError if nothing is as fast.
    """

    def __init__(
        self,
        timer: LayerTimer,
        layers: Mapping[str, Any],
        members: Mapping[str, Mapping[str, Sequence[Structure]]],
        budget: float,
    ) -> None:
        self._timer, self._layers, self._members = timer, layers, members
        (self._tokens,) = timer.tokens
        sampled = {
            name: [s.spec for family in families.values() for s in _evenly_spaced(family)]
            for name, families in members.items()
        }
        for name, layer in layers.items():
            in_other_dtypes = {_label(dtype): partial(_converted, layer, dtype) for dtype in _other_dtypes(layer)}
            self._seconds(name, sampled[name], in_other_dtypes)
        costs = {name: self.costs(name) for name in layers}
        self.dense = sum(of["dense"] for of in costs.values())
        self.budget = int(budget * self.dense)
        if (least := sum(min(of.values()) for of in costs.values())) > self.budget:
            share = (
                f"{budget:g} of the time of {len(layers)} layers for {describe_tokens(timer.tokens)} cannot be reached"
            )
            raise ValueError(f"{share}: the fastest structures take {least / self.dense:.4f} of it on this machine")

    def costs(self, name: str) -> dict[str, int]:
        """Return the nanoseconds of a layer, "dense" and by spec: measured ones, and for the others interpolated."""
        costs = self._measured_costs(name)
        for family in self._members[name].values():
            costs |= _interpolated(family, costs)
        return costs

    def allocate(
        self, candidates: Mapping[str, Sequence[LayerCandidate]]
    ) -> tuple[dict[str, LayerCandidate], list[str]]:
        """Choose one candidate per layer among those faster than dense, and list the layers that have none.

        The structures chosen are timed themselves, and the choice is made again; at last, of timed structures alone.
        """
        for _ in range(_ROUNDS):
            chosen = self._allocate(candidates, self.costs)
            untimed = {name: c.spec for name, c in chosen.items() if c.spec not in self._seconds(name)}
            if not untimed:
                break
            # those of one size in the same rounds of calls
            by_size: dict[str, tuple[str, list[str]]] = {}
            for name, spec in untimed.items():
                by_size.setdefault(self._timer.size(self._layers[name]), (name, []))[1].append(spec)
            for name, specs in by_size.values():
                self._seconds(name, specs)
        else:
            chosen = self._allocate(candidates, self._measured_costs)
        options = self._faster(candidates, self.costs)
        return chosen, [name for name, of in options.items() if len(of) == 1 < len(candidates[name])]

    def measured(self, chosen: Mapping[str, LayerCandidate], sensitivities: Mapping[str, Sensitivity]) -> MeasuredTime:
        """Return the time of the layers before and after, and that of the dense layers in other dtypes."""
        alone = []
        for dtype in _DTYPES:
            converted = [name for name, layer in self._layers.items() if dtype in _other_dtypes(layer)]
            costs = {name: self._seconds(name) for name in self._layers}
            seconds = sum(of[_label(dtype) if name in converted else "dense"] for name, of in costs.items())
            change = sum(sensitivities[name].at(_rounding_error(dtype)) for name in converted)
            if converted:
                alone.append(DtypeAlone(str(dtype), seconds, change))
        after, change = sum(c.cost for c in chosen.values()), sum(c.output_change for c in chosen.values())
        return MeasuredTime(self._tokens, 1e-9 * self.dense, 1e-9 * after, change, tuple(alone))

    def _allocate(
        self, candidates: Mapping[str, Sequence[LayerCandidate]], costs: Callable[[str], Mapping[str, int]]
    ) -> dict[str, LayerCandidate]:
        faster = self._faster(candidates, costs)
        # measured ones may take longer than was estimated
        return allocate(faster, max(self.budget, least_cost(faster)))

    def _faster(
        self, candidates: Mapping[str, Sequence[LayerCandidate]], costs: Callable[[str], Mapping[str, int]]
    ) -> dict[str, list[LayerCandidate]]:
        """Return the candidates that have a cost and are faster than the dense layer, with these costs."""
        result = {}
        for name, options in candidates.items():
            of = costs(name)
            priced = [replace(c, cost=of[c.spec]) for c in options if c.spec in of]
            result[name] = [c for c in priced if c.spec == "dense" or c.cost < of["dense"]]
        return result

    def _measured_costs(self, name: str) -> dict[str, int]:
        specs = {"dense"}.union(*({s.spec for s in family} for family in self._members[name].values()))
        return {spec: round(1e9 * s) for spec, s in self._seconds(name).items() if spec in specs}

    def _seconds(
        self, name: str, specs: Sequence[str] = (), others: Mapping[str, Callable[[], nn.Module]] | None = None
    ) -> dict[str, float]:
        layer = self._layers[name]
        new = {spec: partial(structured_like, layer, spec) for spec in specs}
        return dict(self._timer.seconds(layer, {**new, **(others or {})}, self._tokens))


def _evenly_spaced(family: Sequence[Structure]) -> list[Structure]:
    """Return a few members from the one of the fewest MACs to the one of the most."""
    ordered = sorted(family, key=lambda s: s.macs)
    count = min(_TIMED, len(ordered))
    return [ordered[round(i * (len(ordered) - 1) / max(count - 1, 1))] for i in range(count)]


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


def _label(dtype: torch.dtype) -> str:
    return f"dense, {dtype}"


def _converted(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(layer).to(dtype)


def _rounding_error(dtype: torch.dtype) -> float:
    """Return the relative squared error of outputs whose weight and inputs are rounded to a dtype."""
    return 2 * torch.finfo(dtype).eps ** 2 / 16
