"""The config of a search."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler

from einlinear_lab.search.space import STRUCTURE, SearchSpace, option_of

# Trained trials before a sampler leaves the random ones, and before any trial is pruned.
STARTUP_TRIALS = 8
SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "gp": lambda seed: GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS),
    "tpe": lambda seed: TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=True),
    "random": lambda seed: RandomSampler(seed),
}


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Config of a search.

    Attributes:
        budget: multiply-accumulates for one input, of every model.
        trials: number of models to be trained.
        hours: no trial starts later than this; None: no limit.
        families: of structures, see `SearchSpace`.
        roles: of linear layers that get a structure of their own, besides the one of all others: "attention_in",
            "attention_out", "up", "down".
        sampler: Optuna's sampler: "gp" (Gaussian process), "tpe" (tree-structured Parzen estimator), "random".
        warm_start: whether the first trials are structures of the literature (`SearchSpace.literature`); never with
            "random".
        prune: whether trials that are behind half of the others are stopped early, by successive halving.
        metric: to be minimised; None: the error that the data is judged by.
        time_weight: how much the time of a training step counts, see `SearchManifest`.
        seed: of the sampler.
        options: of all runs, see `Run.of`, without structure and width.

    Raises:
        ValueError: a value out of range, or an option that the search chooses.
    """

    budget: int
    trials: int = 60
    hours: float | None = None
    families: tuple[str, ...] = ("einsum",)
    roles: tuple[str, ...] = ()
    sampler: str = "gp"
    warm_start: bool = True
    prune: bool = True
    metric: str | None = None
    time_weight: float = 0.0
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be {', '.join(SAMPLERS)}, not {self.sampler!r}")
        for name in ("budget", "trials"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.hours is not None and not self.hours > 0:
            raise ValueError(f"hours must be positive, not {self.hours:g}")
        if self.time_weight < 0:
            raise ValueError(f"time_weight must be at least 0, not {self.time_weight:g}")
        SearchSpace(self.families, self.roles)
        if chosen := sorted(self.axes & self.options.keys()):
            raise ValueError(f"{' and '.join(chosen)} cannot be set: the search chooses them")

    @property
    def axes(self) -> frozenset[str]:
        """The options of the model that the search chooses."""
        return frozenset({STRUCTURE, "width", *map(option_of, self.roles)})
