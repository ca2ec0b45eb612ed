"""Budget of a compression: what "params", "macs", "bytes" or "time" count, and a choice of candidates within it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from torch import nn

from einlinear.compression.allocation import allocate, least_cost
from einlinear.compression.candidates import LayerCandidate, members, reason_for_none
from einlinear.compression.expert_stacks import matrices
from einlinear.compression.layer_timing import LayerTimer
from einlinear.compression.narrowing import NARROW, UNIFORM, ModuleCandidate
from einlinear.compression.resume_cache import ResumeCache
from einlinear.compression.sensitivity import Sensitivity
from einlinear.conversion.replacement import structured_like
from einlinear.nn.dense_layers import features
from einlinear.structures import Structure, structure

# structures of a layer, and the errors of its outputs that they leave
Errors = Sequence[tuple[Structure, float]]
# by layer
Candidates = Mapping[str, Sequence[LayerCandidate]]
Choice = Mapping[str, LayerCandidate]
# a candidate for every layer, and the layers whose structures are all slower than the dense layer
Allocation = tuple[dict[str, LayerCandidate], list[str]]


class Budget:
    """The parameters, or what else a subclass counts, that all layers may have together.

    Args:
        fraction, families, only_if_faster: the arguments `budget`, `structures` and `only_if_faster` of `compress`.
        layers: the dense ones by name.
        timer: of structured layers beside dense ones.

    Attributes:
        members: structures by layer and family.
    """

    count = "params"

    def __init__(
        self,
        fraction: float,
        layers: Mapping[str, Any],
        families: Sequence[str],
        timer: LayerTimer,
        only_if_faster: bool = False,
    ) -> None:
        self._fraction, self._layers, self._families = fraction, layers, families
        self._timer, self._only_if_faster = timer, only_if_faster
        self._alone = [family for family in families if family not in (NARROW, UNIFORM)]
        self.members = {n: {f: [*members(f, *features(layer))] for f in self._alone} for n, layer in layers.items()}

    @staticmethod
    def check_options(families: Sequence[str], tokens: int | None, only_if_faster: bool) -> None:
        """Raise ValueError for options of `compress` that do not go with this kind of budget."""

    def measure_costs(self) -> None:
        """Measure what a subclass counts, if it does not follow from sizes alone."""

    @cached_property
    def total(self) -> int:
        """Cost of the dense layers."""
        return sum(map(self.dense_cost, self._layers))

    @property
    def largest(self) -> int:
        """The most that may be spent: the fraction of the total."""
        return int(self._fraction * self.total)

    def costs(self, name: str) -> dict[str, int]:
        """Return the least cost of a layer as "dense" and in every structure, by spec."""
        each = matrices(self._layers[name], self.count)
        return {s.spec: each * getattr(s, self.count) for s in self._structures(name)}

    def dense_cost(self, name: str) -> int:
        """Return the cost of a layer as it is."""
        return self.costs(name)["dense"]

    def candidates(self, name: str, errors: Errors, sensitivity: Sensitivity, cached: Callable[..., Any]) -> list[Any]:
        """Return the candidates of a layer; `cached` is that of `LayerResults`."""
        costs = self.costs(name)
        return [LayerCandidate(s.spec, costs[s.spec], error, sensitivity.at(error)) for s, error in errors]

    def allocate(self, candidates: Candidates, modules: Sequence[ModuleCandidate], cache: ResumeCache) -> Allocation:
        """Choose candidates, so that the model's output changes least."""

        def decode(record: Any) -> Allocation:
            options = {n: [*of, *(m[n] for m in modules if n in m)] for n, of in candidates.items()}
            chosen = {n: {c.label: c for c in of}[record["structures"][n]] for n, of in options.items()}
            return chosen, list(record["slow"])

        self.check(least_cost(candidates, modules))
        return cache.get_or("allocation", partial(self._allocate, candidates, modules), decode)

    def _allocate(self, candidates: Candidates, modules: Sequence[ModuleCandidate]) -> dict[str, Any]:
        left = {name: list(options) for name, options in candidates.items()}
        while True:
            chosen = allocate(left, max(self.largest, least_cost(left, modules)), modules)
            slow = {name: c for name, c in chosen.items() if c.spec != "dense" and self._is_slower(name, c.spec)}
            for name, c in slow.items():
                # larger ranks are no faster
                left[name] = [o for o in left[name] if o.cost < c.cost or _any_rank(o.spec) != _any_rank(c.spec)]
            if not slow:
                stay = [name for name in left if len(left[name]) == 1 < len(candidates[name])]
                return {"structures": {name: candidate.label for name, candidate in chosen.items()}, "slow": stay}

    def _is_slower(self, name: str, spec: str) -> bool:
        layer = self._layers[name]
        if isinstance(layer, nn.Embedding):
            return False
        return self._only_if_faster and self._timer(layer, structured_like(layer, spec)).is_slower

    def alternatives(
        self, candidates: Candidates, chosen: Choice, sensitivities: Mapping[str, Sensitivity]
    ) -> dict[str, Any]:
        """Return fields of the report that compare the choice with simpler means."""
        return {}

    @property
    def reasons(self) -> dict[str, str]:
        """Why layers without any structure stay dense."""
        without = [name for name, families in self.members.items() if self._alone and not any(families.values())]
        return {name: reason_for_none(self._alone, *features(self._layers[name])) for name in without}

    def check(self, least: int | None = None) -> None:
        """Raise ValueError if the least that layers can cost, by default in structures, is more than the budget."""
        if least is None:
            least = sum(min(self.costs(name).values()) for name in self._layers)
        if least > self.largest:
            share = f"{self._fraction:g} of the {self._describe()} cannot be reached"
            because = "".join(f"; {name}: {reason}" for name, reason in self.reasons.items())
            cheapest = f"the cheapest choice keeps {least / self.total:.4f}{because}"
            raise ValueError(f"{share} with {', '.join(self._families)}: {cheapest}")

    def _describe(self) -> str:
        return f"{self.total:,} {self.count} of {len(self._layers)} layers"

    def _structures(self, name: str) -> list[Structure]:
        dense = structure("dense", *features(self._layers[name]))
        return [dense, *(s for family in self.members[name].values() for s in family)]


class MacsBudget(Budget):
    """A budget of multiply-accumulates for one token, of all layers or active experts."""

    count = "macs"


def total_change(chosen: Choice) -> float:
    """Return the expected change of the model's output."""
    return sum(candidate.output_change for candidate in chosen.values())


def _any_rank(spec: str) -> str:
    return re.sub(r"rank=\d+", "rank", spec)
