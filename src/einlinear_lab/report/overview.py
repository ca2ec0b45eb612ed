"""The headline, the setup of the runs, and the tables of all models and all runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from einlinear_lab.analysis.columns import Column
from einlinear_lab.analysis.comparison import Comparison, metric_of, metric_title, result_of
from einlinear_lab.analysis.model_table import config_column, metric_column, model_columns, words
from einlinear_lab.models.config import DENSE
from einlinear_lab.report.page import Section, SortableTable, definitions

# values of a hyperparameter that are listed
_MAX_VALUES = 12


def headline(comparison: Comparison) -> str:
    """Return the main result in one sentence: the largest compute multiplier, of the error."""
    error, groups = metric_title(comparison.metric), comparison.groups
    means = [(group, over.mean) for group in groups if (over := group.multipliers.get(comparison.metric))]
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
    varied = {words(name): f"{_listed(values)} ({len(values)})" for name, values in comparison.varied.items()}
    fixed = {
        words(name): _listed([value]) for name, value in run.hyperparameters.items() if name not in comparison.varied
    }
    diverged, source = sum(result_of(record).diverged for record in records), records[0].data_source.rstrip(".")
    text = Markup("<p>{} finished runs, {} of them diverged{}. Models: {}, trained on {}: {}.</p>\n").format(
        len(records), diverged, unfinished, models, run.data.data, source
    )
    text += Markup(
        "<p>Quality is measured by {}, compute by the multiply-accumulates (MACs) of a forward pass for one {}.</p>\n"
    ).format(metric_title(comparison.metric), comparison.input)
    text += Markup("<p>Varied hyperparameters:</p>\n{}").format(definitions(varied)) if varied else ""
    text += Markup(
        "<details><summary>{} hyperparameters shared by all runs</summary>{}</details>\n<p>Commands:</p>"
    ).format(len(fixed), definitions(fixed))
    text += Markup().join(Markup("<pre>{}</pre>\n").format(line) for line in commands)
    return Section("Setup", text)


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
        "(--interleave). <b>ms per step</b>: median training step on {}, without data loading. <b>MB</b>: on a GPU the "
        "peak memory of a step, on a CPU parameters, gradients and optimizer state. <b>Seeds</b>: runs in the means, "
        "of all where some diverged."
    ).format(comparison.input, rates, devices)
    index = {curve.name: i for i, curve in enumerate(comparison.curves)}
    models = SortableTable.of(columns, note, curves=[index[group.curve] for group in groups])
    return Section("All models", tables=[models, _run_table(comparison)])


def _run_table(comparison: Comparison) -> SortableTable:
    records = comparison.records
    columns = [Column.of("run", (record.run.key for record in records))]
    for name in ("structure", *(name for name in comparison.varied if name != "structure")):
        columns.append(config_column(name, (record.run.hyperparameters.get(name) for record in records)))
    for metric in comparison.all_metrics:
        values = (metric_of(record, metric) for record in records)
        columns.append(metric_column(metric, values, (result_of(record).diverged for record in records)))
    columns.append(Column.of("code", (record.code for record in records)))
    note = "The folder of a run ends with its key, runs/…-KEY; its run.json holds the whole configuration."
    return SortableTable.of(columns, note, summary=f"All {len(records)} runs")


def _listed(values: Sequence[Any]) -> str:
    texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
    if len(texts) > _MAX_VALUES:
        texts = [*texts[: _MAX_VALUES - 1], "…", texts[-1]]
    return "; ".join(texts) if any("," in text for text in texts) else ", ".join(texts)
