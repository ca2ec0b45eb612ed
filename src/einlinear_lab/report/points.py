"""Points of charts: hover labels, and rows of CSV files."""

from __future__ import annotations

from markupsafe import escape

from einlinear_lab.analysis.comparison import SeedGroup, result_of
from einlinear_lab.report.page import CsvRow
from einlinear_lab.runs.records import Record


def hover(*records: Record) -> str:
    """Return the hover label of a point: the run, or the runs of several seeds whose mean the point is."""
    run, keys = records[0].run, ", ".join(record.run.key for record in records[:4])
    one = len(records) == 1
    seeds = f"seed {run.seed}" if one else f"mean of seeds {', '.join(str(record.run.seed) for record in records)}"
    return (
        f"{escape(run.model.structure)}, width {run.model.width}<br>lr {run.training.lr:g}, {seeds}<br>"
        f"{'key' if one else 'keys'} {keys}{' …' if len(records) > 4 else ''}"
    )


def run_row(curve: str, record: Record, **values: object) -> CsvRow:
    """Return the CSV row of a point of a run: its configuration, its costs, and the values of the point."""
    run, result = record.run, result_of(record)
    model, training = run.model, run.training
    names = {"key": run.key, "curve": curve, "structure": model.structure, "structure_aware": training.structure_aware}
    sizes = {"width": model.width, "lr": training.lr, "seed": run.seed, "macs": result.macs, "params": result.params}
    return {**names, **sizes, **values}


def group_row(group: SeedGroup, **values: object) -> CsvRow:
    """Return the CSV row of a mean over seeds: the configuration, the MACs, and the values of the point."""
    model = group.run.model
    return {"structure": model.structure, "width": model.width, "macs": group.result.macs, **values}
