"""`einlinear map`: options and printed tables."""

from __future__ import annotations

from einlinear_lab.cli import display
from einlinear_lab.cli.arguments import Folders
from einlinear_lab.cli.endings import user_errors
from einlinear_lab.cli.packages import LAB, require
from einlinear_lab.cli.report import PageFile

_ROWS = 10


def command(folders: Folders, out: PageFile = None) -> None:
    """Map a search: the exponents of its structures against their loss."""
    require(LAB)
    from einlinear_lab.report import write_report
    from einlinear_lab.report.comparison import compare_runs, metric_title
    from einlinear_lab.report.structure_map import MIN_STRUCTURES, coefficient_cells, map_of, map_table
    from einlinear_lab.runs.store import open_store

    with user_errors():
        comparisons = compare_runs(record for folder in folders for record in open_store(folder).records())
        maps = [(comparison, map_) for comparison in comparisons if (map_ := map_of(comparison, comparison.error))]
        if not maps:
            raise ValueError(
                f"{' and '.join(map(str, folders))}: a map needs {MIN_STRUCTURES} structures of about the same MACs, "
                "each shared by all layers of a model, and errors above 0"
            )
        report = write_report(folders, out)
    for comparison, map_ in maps:
        error = metric_title(comparison.error)
        display.note(f"{comparison}: {len(map_.points)} structures at {map_.compute:,.0f} MACs per {comparison.input}")
        table = map_table(map_.points[:_ROWS], error)
        display.show(table.headings, [[cell.text for cell in row] for row in table.rows])
        cells = coefficient_cells(map_.regression)
        coefficients = [(sign, *(cell.text for cell in row)) for sign, row in cells.items()]
        display.show(("exponent", f"coefficient for log {error}", "95 % interval"), coefficients)
        if map_.unfinished:
            display.note(f"{len(map_.unfinished)} more structures are left out: pruned or not finished.")
        best = map_.points[0].structure
        display.note(f"Lowest {error}:\n    import einlinear as el\n    el.convert(model, {best!r})\n")
    for warning in report.warnings:
        display.warning(warning)
    display.note(f"Report: {report.path}")
