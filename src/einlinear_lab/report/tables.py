"""The table of all models, and that of all runs."""

from __future__ import annotations

import json
from collections.abc import Sequence

from markupsafe import Markup

from einlinear_lab.findings.summary import Row, Study, in_words, result, value
from einlinear_lab.report.page import Cell, Section, Table


def all_models(study: Study, commands: Sequence[str]) -> Section:
    """Every model, averaged over its seeds, and below it every run."""
    return Section("All models", Markup(), [_models(study), _runs(study)], commands)


def _models(study: Study) -> Table:
    options = ["width", *(name for name in study.varied if name not in ("structure", "width", "seed"))]
    measures = study.all_measures
    times = [measure for measure in study.measures if any(measure in row.multipliers for row in study.rows)]
    headings = (
        "structure",
        *(name.replace("_", " ") for name in options),
        f"MACs per {study.input}",
        *map(in_words, measures),
        *(f"× compute, {in_words(measure)}" for measure in times),
        "parameters",
        "ms per step",
        "MB",
        "seeds",
    )
    index = {curve.name: i for i, curve in enumerate(study.curves)}
    rows = [
        [
            Cell(row.run.model.structure, row.curve, index[row.curve]),
            *(_option(row.run.identity.get(name)) for name in options),
            Cell(f"{row.result.macs:,}", row.result.macs),
            *(_mean(row, measure) for measure in measures),
            *(_multiplier(row, measure) for measure in times),
            Cell(f"{row.result.params:,}", row.result.params),
            _milliseconds(row.step_seconds),
            _megabytes(row.result.memory),
            Cell(row.seed_count, len(row.good)),
        ]
        for row in study.rows
    ]
    note = Markup(
        "Means over the seeds that did not diverge. <b>Training loss</b>: over the batches of the last tenth of the "
        "steps, as they are trained on. <b>MACs</b>: multiply-accumulates of a forward pass for one {}. "
        "<b>× compute</b>: how many times these MACs dense needs for the same loss, interpolated on the curve of the "
        "dense models of the same seed{}; &gt; and &lt; where that curve ends before it says. Over several seeds: "
        "geometric mean and, in brackets, the range. <b>ms per step</b>: median training step on {}, without the data. "
        "<b>MB</b>: on a GPU the most that a step took, on a CPU parameters, gradients and the optimizer's state. "
        "<b>Seeds</b>: runs that the means are over, of all where some diverged."
    ).format(
        study.input,
        " at their best learning rates" if "lr" in study.varied else "",
        " and ".join(sorted({record.run.training.device for record in study.records})),
    )
    return Table(headings, rows, note)


def _runs(study: Study) -> Table:
    options = ["structure", *(name for name in study.varied if name != "structure")]
    measures = study.all_measures
    headings = ("run", *(name.replace("_", " ") for name in options), *map(in_words, measures), "code")
    rows = [
        [
            Cell(record.run.key, record.run.key),
            *(_option(record.run.identity.get(name)) for name in options),
            *(_number(value(record, measure), "diverged" if result(record).diverged else "–") for measure in measures),
            Cell(record.code, record.code),
        ]
        for record in study.records
    ]
    note = Markup("Each is in a folder whose name ends with its key: runs/…-KEY, with all its settings in run.json.")
    return Table(headings, rows, note, summary=f"All {len(rows)} runs")


def _option(value: object) -> Cell:
    if isinstance(value, bool) or value is None or isinstance(value, list):
        return Cell("" if value is None else json.dumps(value), json.dumps(value))
    if isinstance(value, (int, float)):
        return Cell(f"{value:g}" if isinstance(value, float) else str(value), value)
    return Cell(str(value), str(value))


def _mean(row: Row, measure: str) -> Cell:
    return _number(row.mean(measure), "–" if row.good else "diverged")


def _number(number: float | None, otherwise: str) -> Cell:
    return Cell(otherwise) if number is None else Cell(f"{number:.4f}", number)


def _multiplier(row: Row, measure: str) -> Cell:
    spread = row.multipliers.get(measure)
    if spread is None:
        return Cell("–")
    return Cell(str(spread), spread.mean.value if spread.mean else None)


def _milliseconds(seconds: float | None) -> Cell:
    return Cell("–") if seconds is None else Cell(f"{1000 * seconds:.2f}", seconds)


def _megabytes(memory: int | None) -> Cell:
    return Cell("–") if memory is None else Cell(f"{memory / 1e6:,.1f}", memory)
