"""The table of models: sizes, losses, multipliers and costs, averaged over seeds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from einlinear_lab.analysis.columns import MISSING, Column, Number
from einlinear_lab.analysis.comparison import Comparison, SeedGroup, metric_title
from einlinear_lab.scaling import MultiplierOverSeeds


def model_columns(comparison: Comparison, groups: Sequence[SeedGroup], metrics: Mapping[str, str]) -> list[Column]:
    """Return the table of models, with the multipliers of metrics, by the end of their headings."""
    names = ["width", *(name for name in comparison.varied if name not in ("structure", "width", "seed"))]
    columns = [Column("structure", [group.curve for group in groups], [group.run.model.structure for group in groups])]
    columns += [config_column(name, (group.run.hyperparameters.get(name) for group in groups)) for name in names]
    columns.append(Column.of(f"MACs per {comparison.input}", (group.result.macs for group in groups), ","))
    for name in comparison.all_metrics:
        means = metric_column(name, (group.mean(name) for group in groups), (not group.good for group in groups))
        columns.append(means)
    for end, metric in metrics.items():
        over = [group.multipliers.get(metric) for group in groups]
        columns.append(_multiplier_column(f"compute multiplier{end}", over))
        over = [group.time_multipliers.get(metric) for group in groups]
        columns.append(_multiplier_column(f"time multiplier{end}", over))
    milliseconds = [(seconds := group.step_seconds) and 1000 * seconds for group in groups]
    megabytes = [(memory := group.result.memory) and memory / 1e6 for group in groups]
    return [
        *columns,
        Column.of("parameters", (group.result.params for group in groups), ","),
        Column.of("ms per step", milliseconds, ".2f"),
        Column.of("MB", megabytes, ",.1f"),
        Column("seeds", [len(group.good) for group in groups], [group.seed_count for group in groups]),
    ]


def config_column(name: str, values: Iterable[object]) -> Column:
    """Return the column of a hyperparameter; models without it have an empty cell."""
    numbers, texts = list[Number](), list[str]()
    for value in values:
        text = value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)
        numbers.append(value if isinstance(value, (int, float)) and not isinstance(value, bool) else text)
        texts.append("" if value is None else text)
    return Column(words(name), numbers, texts)


def metric_column(name: str, values: Iterable[float | None], diverged: Iterable[bool]) -> Column:
    """Return the column of a metric, in which diverged runs are named."""
    column = Column.of(metric_title(name), values, ".4f")
    texts = [
        "diverged" if value is None and is_diverged else text
        for value, text, is_diverged in zip(column.values, column.texts, diverged, strict=True)
    ]
    return Column(column.heading, column.values, texts)


def words(name: str) -> str:
    """Return the name of a hyperparameter for headings."""
    return name.replace("_", " ")


def _multiplier_column(heading: str, over: Sequence[MultiplierOverSeeds | None]) -> Column:
    values = [one.mean.value if one and one.mean else None for one in over]
    return Column(heading, values, [str(one or MISSING) for one in over])
