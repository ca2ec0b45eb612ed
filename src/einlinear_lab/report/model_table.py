"""The table of all models, and the table of all runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from einlinear_lab.report.comparison import Comparison, SeedGroup, metric_of, metric_title, result_of
from einlinear_lab.report.page import Cell, Section, SortableTable


def model_columns(
    comparison: Comparison, groups: Sequence[SeedGroup], multipliers: Mapping[str, str]
) -> dict[str, list[Cell]]:
    """Return the table of models as columns by heading: hyperparameters, metrics, compute multipliers and costs.

    Args:
        comparison: the comparison of the models.
        groups: the models, a row each.
        multipliers: heading -> metric of the compute multipliers to show.
    """
    index = {curve.name: i for i, curve in enumerate(comparison.curves)}
    names = ["width", *(name for name in comparison.varied if name not in ("structure", "width", "seed"))]
    results = [group.result for group in groups]

    def metric_cells(name: str) -> list[Cell]:
        return [Cell.of(group.mean(name), ".4f", "–" if group.good else "diverged") for group in groups]

    return {
        "structure": [Cell(group.run.model.structure, group.curve, index[group.curve]) for group in groups],
        **{name.replace("_", " "): [_config_cell(group.run.identity.get(name)) for group in groups] for name in names},
        f"MACs per {comparison.input}": [Cell.of(result.macs, ",") for result in results],
        **{metric_title(name): metric_cells(name) for name in comparison.all_metrics},
        **{heading: [_multiplier_cell(group, name) for group in groups] for heading, name in multipliers.items()},
        "parameters": [Cell.of(result.params, ",") for result in results],
        "ms per step": [Cell.of((seconds := group.step_seconds) and 1000 * seconds, ".2f") for group in groups],
        "MB": [Cell.of(result.memory and result.memory / 1e6, ",.1f") for result in results],
        "seeds": [Cell(group.seed_count, len(group.good)) for group in groups],
    }


def section(comparison: Comparison) -> Section:
    """Show every model, averaged over its seeds, and below it every run."""
    groups = comparison.groups
    metrics = [metric for metric in comparison.metrics if any(metric in group.multipliers for group in groups)]
    columns = model_columns(comparison, groups, {f"compute multiplier, {metric_title(name)}": name for name in metrics})
    note = Markup(
        "Means over the seeds that did not diverge. <b>Training loss</b>: mean over the batches of the last tenth of "
        "the steps. <b>MACs</b>: multiply-accumulates of a forward pass for one {}. <b>Compute multiplier</b>: how "
        "many times these MACs dense needs for the same loss, interpolated on the curve of the dense models of the "
        "same seed{}; &gt; and &lt; are bounds where that curve ends. Over several seeds: geometric mean, range in "
        "brackets. <b>ms per step</b>: median training step on {}, without data loading. <b>MB</b>: on a GPU the peak "
        "memory of a step, on a CPU parameters, gradients and optimizer state. <b>Seeds</b>: runs in the means, of all "
        "where some diverged."
    ).format(
        comparison.input,
        " at their best learning rates" if "lr" in comparison.varied else "",
        " and ".join(sorted({record.run.training.device for record in comparison.records})),
    )
    models = SortableTable(list(columns), list(zip(*columns.values(), strict=True)), note)
    return Section("All models", tables=[models, _run_table(comparison)])


def _run_table(comparison: Comparison) -> SortableTable:
    names = ["structure", *(name for name in comparison.varied if name != "structure")]
    headings = ("run", *(name.replace("_", " ") for name in names), *map(metric_title, comparison.all_metrics), "code")
    rows = []
    for record in comparison.records:
        missing = "diverged" if result_of(record).diverged else "–"
        config = (_config_cell(record.run.identity.get(name)) for name in names)
        metrics = (Cell.of(metric_of(record, metric), ".4f", missing) for metric in comparison.all_metrics)
        rows.append([Cell.of(record.run.key), *config, *metrics, Cell.of(record.code)])
    note = Markup("The folder of a run ends with its key, runs/…-KEY; its run.json holds the whole configuration.")
    return SortableTable(headings, rows, note, summary=f"All {len(rows)} runs")


def _config_cell(value: object) -> Cell:
    if isinstance(value, (bool, list)) or value is None:
        return Cell("" if value is None else json.dumps(value), json.dumps(value))
    number = value if isinstance(value, (int, float)) else str(value)
    return Cell.of(number, "g" if isinstance(value, float) else "")


def _multiplier_cell(group: SeedGroup, metric: str) -> Cell:
    over = group.multipliers.get(metric)
    return Cell(str(over or "–"), over.mean.value if over and over.mean else None)
