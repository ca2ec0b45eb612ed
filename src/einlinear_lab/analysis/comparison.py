"""Runs on the same data as one comparison: a curve per structure, a group of seeds per model and learning rate."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean, median
from typing import Any

from einlinear_lab.models.config import DENSE, OF_EXPERTS
from einlinear_lab.runs.records import METRICS, Record, Result
from einlinear_lab.runs.run import Run
from einlinear_lab.scaling import Multiplier, MultiplierOverSeeds, compute_multiplier, multiplier_over_seeds
from einlinear_lab.training.metrics import read as read_metrics

TRAIN_LOSS = "train_loss"
SIZES = ("width", "depth", "expansion", "heads", "d_head")
LENGTHS = ("steps", "warmup")
BATCH_SIZE = "batch_size"
_NOT_IN_NAMES = {"structure", "lr", "seed", *SIZES}
# Hyperparameters that do not change the result on data of the same digest: data may have two names, and an evaluation
# changes nothing.
_IRRELEVANT = {"data", "data_kind", "evaluate_every"}


@dataclass(frozen=True)
class SeedGroup:
    """Finished runs of a named curve that differ only in their seed. Means leave out diverged runs."""

    curve: str
    records: tuple[Record, ...]
    # metric -> compute multiplier against dense models of the same seeds; 1 for dense itself
    multipliers: Mapping[str, MultiplierOverSeeds] = field(default_factory=dict)
    # the same for the duration of the training
    time_multipliers: Mapping[str, MultiplierOverSeeds] = field(default_factory=dict)

    @property
    def run(self) -> Run:
        """The configuration of the first seed."""
        return self.records[0].run

    @property
    def result(self) -> Result:
        """The result of the first seed, for the costs, which all seeds share."""
        return result_of(self.records[0])

    @property
    def good(self) -> tuple[Record, ...]:
        return tuple(record for record in self.records if not result_of(record).diverged)

    @property
    def diverged(self) -> int:
        return len(self.records) - len(self.good)

    @property
    def seed_count(self) -> str:
        """The number of seeds behind the means: "3", or "2 of 3" where one diverged."""
        return f"{len(self.good)} of {len(self.records)}" if self.diverged else str(len(self.good))

    def values(self, metric: str) -> list[float]:
        """Return the metric of every seed that did not diverge."""
        return [value for record in self.good if (value := metric_of(record, metric)) is not None]

    def mean(self, metric: str) -> float | None:
        """Return the mean of the metric over the seeds; None where all diverged."""
        values = self.values(metric)
        return fmean(values) if values else None

    @property
    def step_seconds(self) -> float | None:
        """The duration of a training step, the median over the seeds."""
        seconds = [result_of(record).step_seconds for record in self.records]
        return median(filter(None, seconds)) if any(seconds) else None

    @property
    def inputs_per_second(self) -> float | None:
        """The training throughput in images, tokens or vectors per second."""
        return self.result.inputs / self.step_seconds if self.step_seconds else None

    def compute_at(self, step: int) -> float:
        """Return the MACs of all forward passes so far: more with guides, less before layers are made dense."""
        result, dense_from, guided = self.result, self.run.training.densify_at, self.run.training.guide_until or 0
        final, guides = result.macs * result.inputs, result.guide_macs * result.inputs
        if dense_from is None or result.steps <= dense_from:
            return step * final + min(step, guided) * guides
        structured = (result.compute - guided * guides - (result.steps - dense_from) * final) / dense_from
        return min(step, guided) * guides + min(step, dense_from) * structured + max(step - dense_from, 0) * final


@dataclass(frozen=True)
class Curve:
    """One structure, with one choice of all hyperparameters but model size, learning rate and seed.

    Attributes:
        name, config: the structure, and those hyperparameters of which a structure has several values.
        groups: all groups, by MACs, then by learning rate.
        best: for every model size the learning rate of the lowest error among those with the fewest diverged seeds.
    """

    name: str
    structure: str
    config: Mapping[str, Any]
    groups: tuple[SeedGroup, ...]
    best: tuple[SeedGroup, ...]

    @property
    def structure_aware(self) -> bool:
        """Whether it was trained with structure-aware learning rates; the others are naive controls."""
        return bool(self.config.get("structure_aware", True))


@dataclass(frozen=True)
class Comparison:
    """Finished runs on the same data, whose metrics are comparable."""

    records: tuple[Record, ...]
    # the hyperparameters with several values, and these values in order
    varied: Mapping[str, tuple[Any, ...]]
    # dense first, the others by name
    curves: tuple[Curve, ...]
    # runs without a result: pruned, interrupted, or still running
    unfinished: tuple[Record, ...] = ()

    @property
    def metric(self) -> str:
        """The metric that measures the quality of a model."""
        return self.records[0].metric

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that figures show."""
        return metrics_of(self.records[0])

    @property
    def all_metrics(self) -> tuple[str, ...]:
        """The training loss, the metric of quality, and every other metric of any run."""
        others = (name for record in self.records for name in result_of(record).metrics)
        return tuple(dict.fromkeys((TRAIN_LOSS, self.metric, *others)))

    @property
    def groups(self) -> list[SeedGroup]:
        return [group for curve in self.curves for group in curve.groups]

    @cached_property
    def input(self) -> str:
        """The input that MACs are counted for: "image", "vector" or "token"."""
        return {"images": "image", "teacher": "vector"}.get(self.records[0].run.data.KIND, "token")

    def values(self, record: Record) -> dict[str, float | None]:
        return {metric: metric_of(record, metric) for metric in self.metrics}

    def __str__(self) -> str:
        models = sorted({record.run.model.NAME for record in self.records})
        return f"{' and '.join(models)} on {self.records[0].run.data.data}"


def compare_runs(records: Iterable[Record]) -> list[Comparison]:
    """Group runs into comparisons: one for each data set and error metric that finished runs have."""
    finished: dict[tuple[str, str], dict[str, Record]] = {}
    unfinished: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        key = record.data_digest, record.metric
        if record.result:
            finished.setdefault(key, {})[record.run.key] = record
        else:
            unfinished.setdefault(key, []).append(record)
    comparisons = []
    for key, by_key in finished.items():
        runs = tuple(by_key.values())
        curves, metrics = make_curves(runs), metrics_of(runs[0])
        compared = tuple(_with_multipliers(curve, dense_of(curve, curves), metrics) for curve in curves)
        comparisons.append(Comparison(runs, _varied(runs), compared, tuple(unfinished.get(key, ()))))
    return comparisons


def metrics_of(record: Record) -> tuple[str, ...]:
    """Return the metrics by which a run is compared with others."""
    return (record.metric, TRAIN_LOSS)


def result_of(record: Record) -> Result:
    assert record.result is not None
    return record.result


def metric_of(record: Record, metric: str) -> float | None:
    """Return a metric of a finished run, "train_loss" included; None where the run diverged."""
    result = result_of(record)
    return result.train_loss if metric == TRAIN_LOSS else result.metrics.get(metric)


def metric_title(metric: str) -> str:
    """Return a metric's name for titles and headings."""
    return "training loss" if metric == TRAIN_LOSS else metric.replace("_", " ")


def logged(record: Record, metric: str) -> list[tuple[int, float, float]]:
    """Return step, seconds of training and value wherever a run logged a metric."""
    lines = read_metrics(record.folder / METRICS)
    return [(line["step"], line["training_seconds"], line[metric]) for line in lines if line.get(metric) is not None]


def make_curves(records: Sequence[Record], shared: Collection[str] = ()) -> list[Curve]:
    """Group finished runs on the same data into curves, dense first; values of `shared` options share a curve."""
    by_structure: dict[str, list[Record]] = {}
    for record in records:
        by_structure.setdefault(record.run.model.structure, []).append(record)
    varied = dict.fromkeys(name for runs in by_structure.values() for name in _varied(runs))
    named = [name for name in varied if name not in {*_NOT_IN_NAMES, *shared}]
    by_name: dict[str, list[Record]] = {}
    for record in records:
        by_name.setdefault(_curve_name(record.run, named), []).append(record)
    curves = [_curve(name, named, runs) for name, runs in by_name.items()]
    return sorted(curves, key=lambda curve: (curve.structure != DENSE, curve.name))


def dense_of(curve: Curve, curves: Sequence[Curve]) -> Curve | None:
    """Return the dense curve to compare with: the one of the same hyperparameters, else the only one.

    Mixtures of experts, dense ones included, are compared with dense models without experts where there are any.
    """
    candidates = [dense for dense in curves if dense.structure == DENSE and dense.structure_aware]
    plain = [dense for dense in candidates if dense.config.get("experts") is None and "experts" in dense.config]
    ignored = {"structure_aware", *(("experts", *OF_EXPERTS) if plain else ())}

    def config(curve: Curve) -> dict[str, Any]:
        return {name: value for name, value in curve.config.items() if name not in ignored}

    candidates = plain or candidates
    candidates = [dense for dense in candidates if config(dense) == config(curve)] or candidates
    return candidates[0] if len(candidates) == 1 else None


def _varied(records: Sequence[Record]) -> dict[str, tuple[Any, ...]]:
    """Return the hyperparameters with more than one value among the runs that have them."""
    values: dict[str, dict[str, Any]] = {}
    for record in records:
        for name, value in record.run.hyperparameters.items():
            values.setdefault(name, {})[json.dumps(value)] = value
    varied = {name: options for name, options in values.items() if len(options) > 1 and name not in _IRRELEVANT}
    return {name: tuple(sorted(options.values(), key=_order)) for name, options in varied.items()}


def _order(value: Any) -> tuple[bool, float, str]:
    """Return a sort key: numbers by size, then all others as texts."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return not is_number, value if is_number else 0.0, str(value)


def _curve_name(run: Run, named: Sequence[str]) -> str:
    words = [run.model.structure]
    for name, value in ((name, run.hyperparameters.get(name)) for name in named):
        if name == "structure_aware":
            words += [] if run.hyperparameters.get(name, True) else ["naive"]
        elif value is not None:
            words.append(str(value) if name == "model" else f"{name}={value}")
    return ", ".join(words)


def _curve(name: str, named: Sequence[str], records: Sequence[Record]) -> Curve:
    models: dict[str, dict[float, dict[int, Record]]] = {}
    for record in sorted(records, key=lambda record: (result_of(record).macs, record.run.training.lr, record.run.seed)):
        model = json.dumps([record.run.hyperparameters.get(size) for size in (*SIZES, *LENGTHS, BATCH_SIZE)])
        seeds = models.setdefault(model, {}).setdefault(record.run.training.lr, {})
        # one run per seed: runs that differ in irrelevant hyperparameters are the same
        seeds.setdefault(record.run.seed, record)
    groups = [[SeedGroup(name, tuple(seeds.values())) for seeds in rates.values()] for rates in models.values()]

    def badness(group: SeedGroup) -> tuple[int, float]:
        mean = group.mean(records[0].metric)
        return group.diverged, math.inf if mean is None else mean

    run = records[0].run
    config = {key: run.hyperparameters[key] for key in named if key in run.hyperparameters}
    best = tuple(min(model, key=badness) for model in groups)
    return Curve(name, run.model.structure, config, tuple(itertools.chain(*groups)), best)


def _with_multipliers(curve: Curve, dense: Curve | None, metrics: Sequence[str]) -> Curve:
    """Return a curve whose groups are compared with dense."""
    if dense is None:
        return curve
    groups = {}
    for group in curve.groups:
        compute = {metric: _multiplier(group, dense, metric, lambda result: result.macs) for metric in metrics}
        time = {metric: _multiplier(group, dense, metric, _training_seconds) for metric in metrics}
        groups[group.run.key] = SeedGroup(group.curve, group.records, _identified(compute), _identified(time))
    return replace(curve, groups=tuple(groups.values()), best=tuple(groups[best.run.key] for best in curve.best))


def _identified(multipliers: Mapping[str, MultiplierOverSeeds | None]) -> dict[str, MultiplierOverSeeds]:
    return {metric: over for metric, over in multipliers.items() if over}


def _training_seconds(result: Result) -> float | None:
    return result.step_seconds and result.step_seconds * result.steps


def _multiplier(
    group: SeedGroup, dense: Curve, metric: str, cost: Callable[[Result], float | None]
) -> MultiplierOverSeeds | None:
    """Compare the cost of every run with the dense runs of its own seed, which saw the same batches."""
    # the best dense models have multiplier 1, also where a cheaper dense model reached a lower loss
    if any(group is best for best in dense.best):
        return multiplier_over_seeds([Multiplier(1.0)] * len(group.good))
    multipliers = []
    dense_runs = [record for best in dense.best for record in best.good]
    for record in group.good:
        rivals = [rival for rival in dense_runs if rival.run.seed == record.run.seed]
        costs = [(cost(result_of(rival)), metric_of(rival, metric)) for rival in rivals]
        # an error of zero has no logarithm
        points = [(spent, loss) for spent, loss in costs if spent and loss]
        if points and (spent := cost(result_of(record))) and (loss := metric_of(record, metric)):
            multipliers.append(compute_multiplier(points, spent, loss))
    return multiplier_over_seeds(multipliers)
