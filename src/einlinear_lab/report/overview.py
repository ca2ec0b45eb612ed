"""The headline, the setup of the runs, and the tables of all models and all runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from einlinear_lab.models.config import DENSE
from einlinear_lab.report.comparison import Comparison, SeedGroup, metric_of, metric_title, result_of
from einlinear_lab.report.page import Cell, Section, SortableTable, definitions
from einlinear_lab.scaling import MultiplierOverSeeds

# values of a hyperparameter that are listed
_MAX_VALUES = 12


def headline(comparison: Comparison) -> str:
    """Return the main result in one sentence: the largest compute multiplier, of the error."""
    error, groups = metric_title(comparison.error), comparison.groups
    means = [(group, over.mean) for group in groups if (over := group.multipliers.get(comparison.error))]
    gains = [(group, mean) for group, mean in means if mean and mean.value > 1 and mean.bound != "<"]
    if not means or all(curve.structure == DENSE for curve in comparison.curves):
        return f"{len(comparison.records)} runs of {comparison}: no comparison without dense and another structure."
    if not gains:
        return f"No structure reached its {error} with fewer MACs than dense needs for the same {error}."
    group, mean = max(gains, key=lambda gain: gain[1].value)
    return (
        f"Largest compute multiplier: dense needs {'more than ' if mean.bound else ''}{mean.value:.1f} times the MACs "
        f"of {group.curve} at width {group.run.model.width} ({group.result.macs:,} per {comparison.input}) for the "
        f"same {error}."
    )


def setup_section(comparison: Comparison, commands: Sequence[str]) -> Section:
    """Show the model, the data, the hyperparameters that vary and those that do not."""
    run, records = comparison.records[0].run, comparison.records
    unfinished = f"; {len(comparison.unfinished)} more are not finished" if comparison.unfinished else ""
    models = " and ".join(dict.fromkeys(record.run.model.NAME for record in records))
    varied = {_term(name): f"{_listed(values)} ({len(values)})" for name, values in comparison.varied.items()}
    fixed = {_term(name): _listed([value]) for name, value in run.identity.items() if name not in comparison.varied}
    diverged, source = sum(result_of(record).diverged for record in records), records[0].source.rstrip(".")
    text = Markup("<p>{} finished runs, {} of them diverged{}. Models: {}, trained on {}: {}.</p>\n").format(
        len(records), diverged, unfinished, models, run.data.data, source
    )
    text += Markup(
        "<p>Quality is measured by {}, compute by the multiply-accumulates (MACs) of a forward pass for one {}.</p>\n"
    ).format(metric_title(comparison.error), comparison.input)
    text += Markup("<p>Varied hyperparameters:</p>\n{}").format(definitions(varied)) if varied else ""
    text += Markup(
        "<details><summary>{} hyperparameters shared by all runs</summary>{}</details>\n<p>Commands:</p>"
    ).format(len(fixed), definitions(fixed))
    text += Markup().join(Markup("<pre>{}</pre>\n").format(line) for line in commands)
    return Section("Setup", text)


def model_columns(
    comparison: Comparison, groups: Sequence[SeedGroup], metrics: Mapping[str, str]
) -> dict[str, list[Cell]]:
    """Return the table of models as columns by heading, with the multipliers of metrics, by the end of the heading."""
    index = {curve.name: i for i, curve in enumerate(comparison.curves)}
    names = ["width", *(name for name in comparison.varied if name not in ("structure", "width", "seed"))]
    results = [group.result for group in groups]

    def metric_cells(name: str) -> list[Cell]:
        return [Cell.of(group.mean(name), ".4f", "–" if group.good else "diverged") for group in groups]

    def multiplier_cells(over: Iterable[MultiplierOverSeeds | None]) -> list[Cell]:
        return [Cell(str(one or "–"), one.mean.value if one and one.mean else None) for one in over]

    multipliers: dict[str, list[Cell]] = {}
    for end, metric in metrics.items():
        multipliers[f"compute multiplier{end}"] = multiplier_cells(group.multipliers.get(metric) for group in groups)
        multipliers[f"time multiplier{end}"] = multiplier_cells(group.time_multipliers.get(metric) for group in groups)

    return {
        "structure": [Cell(group.run.model.structure, group.curve, index[group.curve]) for group in groups],
        **{_term(name): [_config_cell(group.run.identity.get(name)) for group in groups] for name in names},
        f"MACs per {comparison.input}": [Cell.of(result.macs, ",") for result in results],
        **{metric_title(name): metric_cells(name) for name in comparison.all_metrics},
        **multipliers,
        "parameters": [Cell.of(result.params, ",") for result in results],
        "ms per step": [Cell.of((seconds := group.step_seconds) and 1000 * seconds, ".2f") for group in groups],
        "MB": [Cell.of(result.memory and result.memory / 1e6, ",.1f") for result in results],
        "seeds": [Cell(group.seed_count, len(group.good)) for group in groups],
    }


def models_section(comparison: Comparison) -> Section:
    """Show every model, averaged over its seeds, and below it every run."""
    groups = comparison.groups
    metrics = [metric for metric in comparison.metrics if any(metric in group.multipliers for group in groups)]
    columns = model_columns(comparison, groups, {f", {metric_title(name)}": name for name in metrics})
    rates = " at their best learning rates" if "lr" in comparison.varied else ""
    devices = " and ".join(sorted({record.run.training.device for record in comparison.records}))
    note = Markup(
        "Means over the seeds that did not diverge. <b>Training loss</b>: mean over the batches of the last tenth of "
        "the steps. <b>MACs</b>: multiply-accumulates of a forward pass for one {}. <b>Compute multiplier</b>: how "
        "many times these MACs dense needs for the same loss, interpolated on the curve of the dense models of the "
        "same seed{}; &gt; and &lt; are bounds where that curve ends. Over several seeds: geometric mean, range in "
        "brackets. <b>Time multiplier</b>: the same for the time of training, if the runs took turns "
        "(--clock). <b>ms per step</b>: median training step on {}, without data loading. <b>MB</b>: on a GPU the peak "
        "memory of a step, on a CPU parameters, gradients and optimizer state. <b>Seeds</b>: runs in the means, of all "
        "where some diverged."
    ).format(comparison.input, rates, devices)
    models = SortableTable(list(columns), list(zip(*columns.values(), strict=True)), note)
    return Section("All models", tables=[models, _run_table(comparison)])


def _run_table(comparison: Comparison) -> SortableTable:
    names = ["structure", *(name for name in comparison.varied if name != "structure")]
    headings = ("run", *map(_term, names), *map(metric_title, comparison.all_metrics), "code")
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


def _term(name: str) -> str:
    return name.replace("_", " ")


def _listed(values: Sequence[Any]) -> str:
    words = [value if isinstance(value, str) else json.dumps(value) for value in values]
    if len(words) > _MAX_VALUES:
        words = [*words[: _MAX_VALUES - 1], "…", words[-1]]
    return "; ".join(words) if any("," in word for word in words) else ", ".join(words)
