"""What runs say together: runs on the same data make a study, its structures make curves, and their seeds make rows."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean, median
from typing import Any

from einlinear_lab.runs.models import DENSE, OF_EXPERTS
from einlinear_lab.runs.records import Record, Result
from einlinear_lab.runs.run import Run
from einlinear_lab.scaling import Multiplier, Spread, compute_multiplier, spread

TRAIN_LOSS = "train_loss"
SIZES = ("width", "depth", "expansion", "heads", "d_head")  # a curve runs over models of all sizes
LENGTHS = ("steps", "warmup")
_NOT_NAMED = {"structure", "lr", "seed", *SIZES}
# Parts of a run's identity on which the results of runs on data of the same digest do not depend: data may have two
# names, and an evaluation changes nothing.
_SAME = {"data", "data_kind", "evaluate_every"}


@dataclass(frozen=True)
class Row:
    """One model at one learning rate: runs that differ by their seed. Those that diverged are in no mean.

    Attributes:
        curve: the name of the curve it is of.
        records: by seed, all finished.
        multipliers: compute multiplier against dense of the same seeds, by measure; of dense itself, 1.
    """

    curve: str
    records: tuple[Record, ...]
    multipliers: Mapping[str, Spread]

    @property
    def run(self) -> Run:
        """The first of the runs, which stands for what they have in common."""
        return self.records[0].run

    @property
    def result(self) -> Result:
        """The first of the results, which stands for what they have in common: the costs."""
        return result(self.records[0])

    @property
    def good(self) -> tuple[Record, ...]:
        """The runs that did not diverge."""
        return tuple(record for record in self.records if not result(record).diverged)

    @property
    def diverged(self) -> int:
        return len(self.records) - len(self.good)

    @property
    def seed_count(self) -> str:
        """How many seeds the means are over: "3", or "2 of 3" where one diverged."""
        return f"{len(self.good)} of {len(self.records)}" if self.diverged else str(len(self.good))

    def values(self, measure: str) -> list[float]:
        """The measure of every seed that did not diverge."""
        found = [value(record, measure) for record in self.good]
        return [value for value in found if value is not None]

    def mean(self, measure: str) -> float | None:
        """The mean over these; None where all diverged."""
        values = self.values(measure)
        return fmean(values) if values else None

    @property
    def step_seconds(self) -> float | None:
        """The median over the seeds."""
        found = [seconds for record in self.records if (seconds := result(record).step_seconds) is not None]
        return median(found) if found else None


@dataclass(frozen=True)
class Curve:
    """One structure, with one choice of all options but sizes, learning rate and seed.

    Attributes:
        name: the structure, and those options of which a structure has several values.
        structure: its spec.
        options: those of the name.
        rows: by MACs, then by learning rate.
        best: of every model, the row of the learning rate with the lowest error among those at which the fewest
            seeds diverged.
    """

    name: str
    structure: str
    options: Mapping[str, Any]
    rows: tuple[Row, ...]
    best: tuple[Row, ...]


@dataclass(frozen=True)
class Study:
    """Finished runs on the same data, whose measures can be compared.

    Attributes:
        records: all of them.
        varied: the options in which they differ, with their values in order.
        curves: dense first, the others by name.
        unfinished: runs of the same folders that have no results: they ended early, or are still running.
    """

    records: tuple[Record, ...]
    varied: Mapping[str, tuple[Any, ...]]
    curves: tuple[Curve, ...]
    unfinished: tuple[Record, ...] = ()

    @property
    def error(self) -> str:
        """The measure that stands for the quality of a model."""
        return self.records[0].error

    @property
    def measures(self) -> tuple[str, ...]:
        """The measures that curves are drawn and fitted for."""
        return (self.error, TRAIN_LOSS)

    @property
    def all_measures(self) -> tuple[str, ...]:
        """The training loss, the error, and what else was measured of any run."""
        others = (name for record in self.records for name in result(record).measures)
        return tuple(dict.fromkeys((TRAIN_LOSS, self.error, *others)))

    @property
    def rows(self) -> list[Row]:
        return [row for curve in self.curves for row in curve.rows]

    @cached_property
    def input(self) -> str:
        """What MACs are counted for: "image", "vector" or "token"."""
        return {"images": "image", "teacher": "vector"}.get(self.records[0].run.data.KIND, "token")

    def size(self, run: Run) -> str:
        """ "width 64", and the other sizes that vary."""
        names = ("width", *(name for name in SIZES[1:] if name in self.varied and run.identity.get(name) is not None))
        return ", ".join(f"{name} {run.identity[name]}" for name in names)

    def __str__(self) -> str:
        models = sorted({record.run.model.NAME for record in self.records})
        return f"{' and '.join(models)} on {self.records[0].run.data.data}"


def studies(records: Iterable[Record]) -> list[Study]:
    """The studies of the finished runs among the records: those on the same data together."""
    groups: dict[tuple[str, str], dict[str, Record]] = {}
    unfinished: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        key = record.digest, record.error
        if record.result:
            groups.setdefault(key, {})[record.run.key] = record
        else:
            unfinished.setdefault(key, []).append(record)
    return [_study(list(group.values()), unfinished.get(key, ())) for key, group in groups.items()]


def result(record: Record) -> Result:
    """The result of a run that is known to be finished."""
    assert record.result is not None
    return record.result


def value(record: Record, measure: str) -> float | None:
    """A measure of a finished run by its name, "train_loss" included; None where it diverged."""
    own = result(record)
    return own.train_loss if measure == TRAIN_LOSS else own.measures.get(measure)


def make_curves(records: Sequence[Record], apart_from: Collection[str] = ()) -> list[Curve]:
    """The curves of runs on the same data, dense first; options in `apart_from` make no curves of their own."""
    of_structures: dict[str, list[Record]] = {}
    for record in records:
        of_structures.setdefault(record.run.model.structure, []).append(record)
    varied = {name: None for own in of_structures.values() for name in _varied(own)}
    named = [name for name in varied if name not in {*_NOT_NAMED, *apart_from}]
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(_name(record.run, named), []).append(record)
    curves = [_curve(name, named, own) for name, own in groups.items()]
    return sorted(curves, key=lambda curve: (curve.structure != DENSE, curve.name))


def dense_of(curve: Curve, curves: Sequence[Curve]) -> Curve | None:
    """The dense curve of the same options; where there is none of these but only one dense curve at all, that one.

    Mixtures of experts, dense ones included, are compared with what is dense and no mixture, if there is any.
    """
    candidates = [own for own in curves if own.structure == DENSE and own.options.get("structure_aware", True)]
    plain = [own for own in candidates if own.options.get("experts") is None and "experts" in own.options]
    ignored = {"structure_aware", *(("experts", *OF_EXPERTS) if plain else ())}

    def options(curve: Curve) -> dict[str, Any]:
        return {name: value for name, value in curve.options.items() if name not in ignored}

    candidates = plain or candidates
    same = [own for own in candidates if options(own) == options(curve)]
    found = same or candidates
    return found[0] if len(found) == 1 else None


def in_words(measure: str) -> str:
    """The name of a measure as titles and headings have it."""
    return "training loss" if measure == TRAIN_LOSS else measure.replace("_", " ")


def _study(records: Sequence[Record], unfinished: Sequence[Record]) -> Study:
    curves, measures = make_curves(records), (records[0].error, TRAIN_LOSS)
    with_multipliers = tuple(_with_multipliers(curve, curves, measures) for curve in curves)
    return Study(tuple(records), _varied(records), with_multipliers, tuple(unfinished))


def _varied(records: Sequence[Record]) -> dict[str, tuple[Any, ...]]:
    """The options that have more than one value among the runs that have them."""
    values: dict[str, dict[str, Any]] = {}
    for record in records:
        for name, given in record.run.identity.items():
            values.setdefault(name, {})[json.dumps(given)] = given
    varied = {name: found for name, found in values.items() if len(found) > 1 and name not in _SAME}
    return {name: tuple(sorted(found.values(), key=_order)) for name, found in varied.items()}


def _order(value: Any) -> tuple[bool, float, str]:
    """The key to sort values by: numbers by size, then all others as texts."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return not number, value if number else 0.0, str(value)


def _name(run: Run, named: Sequence[str]) -> str:
    words = [_words(name, run.identity[name]) for name in named if name in run.identity]
    return ", ".join(filter(None, (run.model.structure, *words)))


def _words(name: str, value: Any) -> str:
    if name == "structure_aware":
        return "" if value else "naive"
    if value is None:
        return ""
    return str(value) if name == "model" else f"{name}={value}"


def _curve(name: str, named: Sequence[str], records: Sequence[Record]) -> Curve:
    models: dict[str, dict[float, dict[int, Record]]] = {}
    for record in sorted(records, key=lambda record: (result(record).macs, record.run.training.lr, record.run.seed)):
        model = [record.run.identity.get(name) for name in (*SIZES, *LENGTHS)]
        of_rate = models.setdefault(json.dumps(model), {}).setdefault(record.run.training.lr, {})
        of_rate.setdefault(record.run.seed, record)  # one of a seed: the same run may have been made twice, see _SAME
    rows = [[Row(name, tuple(own.values()), {}) for own in rates.values()] for rates in models.values()]
    options = {name: records[0].run.identity[name] for name in named if name in records[0].run.identity}
    return Curve(
        name,
        records[0].run.model.structure,
        options,
        tuple(row for own in rows for row in own),
        tuple(min(own, key=_badness) for own in rows),
    )


def _badness(row: Row) -> tuple[int, float]:
    mean = row.mean(row.records[0].error)
    return row.diverged, float("inf") if mean is None else mean


def _with_multipliers(curve: Curve, curves: Sequence[Curve], measures: Sequence[str]) -> Curve:
    dense = dense_of(curve, curves)
    if dense is None:
        return curve

    def multiplied(row: Row) -> Row:
        found = {measure: _multiplier(row, dense, measure) for measure in measures}
        return replace(row, multipliers={measure: spread for measure, spread in found.items() if spread})

    made = {id(row): multiplied(row) for row in curve.rows}
    return replace(curve, rows=tuple(made.values()), best=tuple(made[id(row)] for row in curve.best))


def _multiplier(row: Row, dense: Curve, measure: str) -> Spread | None:
    """The multipliers of a row: every run against the dense runs of its own seed, which saw the same batches."""
    if any(row is own for own in dense.best):  # also where its curve has a bump and a cheaper model reached this loss
        return spread([Multiplier(1.0)] * len(row.good))
    found = []
    for record in row.good:
        points = [
            (result(other).macs, loss)
            for best in dense.best
            for other in best.good
            if other.run.seed == record.run.seed and (loss := value(other, measure))
        ]
        own = value(record, measure)
        if points and own:  # an error of zero has no logarithm
            found.append(compute_multiplier(points, result(record).macs, own))
    return spread(found)
