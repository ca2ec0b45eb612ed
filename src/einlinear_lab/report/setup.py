"""The headline, and the setup of the runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from einlinear_lab.models.config import DENSE
from einlinear_lab.report.comparison import Comparison, metric_title, result_of
from einlinear_lab.report.page import Section, definitions
from einlinear_lab.runs.records import Record

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


def section(comparison: Comparison, commands: Sequence[str]) -> Section:
    """Show the model, the data, the hyperparameters that vary and those that do not."""
    run, records = comparison.records[0].run, comparison.records
    diverged, unfinished = sum(result_of(record).diverged for record in records), len(comparison.unfinished)
    models = " and ".join(dict.fromkeys(record.run.model.NAME for record in records))
    varied = {_term(name): f"{_listed(values)} ({len(values)})" for name, values in comparison.varied.items()}
    fixed = {_term(name): _listed([value]) for name, value in run.identity.items() if name not in comparison.varied}
    text = Markup(
        "<p>{} finished runs, {} of them diverged{}. Models: {}, trained on {}: {}.</p>\n"
        "<p>Quality is measured by {}, compute by the multiply-accumulates (MACs) of a forward pass for one {}.</p>\n"
    ).format(
        len(records),
        diverged,
        f"; {unfinished} more are not finished" if unfinished else "",
        models,
        run.data.data,
        records[0].source.rstrip("."),
        metric_title(comparison.error),
        comparison.input,
    )
    text += Markup("<p>Varied hyperparameters:</p>\n{}").format(definitions(varied)) if varied else ""
    text += Markup(
        "<details><summary>{} hyperparameters shared by all runs</summary>{}</details>\n<p>Commands:</p>"
    ).format(len(fixed), definitions(fixed))
    text += Markup().join(Markup("<pre>{}</pre>\n").format(line) for line in commands)
    return Section("Setup", text)


def code_warning(records: Sequence[Record]) -> list[str]:
    """Return the warning that several versions of the code made the runs; none for a single version."""
    versions = Counter(record.code for record in records)
    if len(versions) < 2:
        return []
    listed = ", ".join(f"{count} by {version}" for version, count in sorted(versions.items()))
    return [
        f"These runs were made by {len(versions)} versions of the code ({listed}) and may not be comparable. The table "
        "of all runs lists the version of every run."
    ]


def _term(name: str) -> str:
    return name.replace("_", " ")


def _listed(values: Sequence[Any]) -> str:
    words = [value if isinstance(value, str) else json.dumps(value) for value in values]
    if len(words) > _MAX_VALUES:
        words = [*words[: _MAX_VALUES - 1], "…", words[-1]]
    return "; ".join(words) if any("," in word for word in words) else ", ".join(words)
