"""`einlinear map`: its options, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from einlinear_lab.cli import display
from einlinear_lab.cli.endings import user_errors
from einlinear_lab.cli.options import Folders
from einlinear_lab.cli.packages import LAB, require

_SHOWN = 10


def command(
    folders: Folders,
    out: Annotated[
        Path | None,
        typer.Option(help="The page to write. Default: report.html in the folder; of several it has to be given."),
    ] = None,
) -> None:
    """Map a search: the exponents of its structures against their loss."""
    require(LAB)
    from einlinear_lab.findings.structure_map import AT_LEAST, structure_map
    from einlinear_lab.findings.summary import in_words, studies
    from einlinear_lab.findings.taxonomy import EXPONENTS
    from einlinear_lab.report import write_report
    from einlinear_lab.runs.store import open_store

    with user_errors():
        found = studies(record for folder in folders for record in open_store(folder).records())
        maps = [(study, own) for study in found if (own := structure_map(study, study.error))]
        if not maps:
            raise ValueError(
                f"{' and '.join(map(str, folders))}: a map needs {AT_LEAST} structures of about the same MACs, each of "
                "which all layers of a model share, and errors above 0"
            )
        made = write_report(folders, out)
    for study, own in maps:
        display.note(f"{study}: {len(own.places)} structures at {own.compute:,.0f} MACs per {study.input}")
        rows = [
            (
                place.structure,
                place.kind,
                str(place.row.run.model.width),
                *(f"{place.exponents[name]:.3g}" for name in EXPONENTS),
                f"{place.loss:.4f}",
            )
            for place in own.places[:_SHOWN]
        ]
        display.show(("structure", "kind", "width", *EXPONENTS, in_words(study.error)), rows)
        effects = []
        for name in EXPONENTS:
            effect = getattr(own.effects, name)
            ends = effect.interval
            interval = f"{ends.low:+.3f} to {ends.high:+.3f}" if ends else "–"
            effects.append((name, f"{effect.value:+.3f}" if ends else "–", interval))
        display.show(("one unit more of", f"log of {in_words(study.error)}", "95 % interval"), effects)
        if own.unfinished:
            display.note(f"{len(own.unfinished)} more, whose runs ended early or are not finished, are not in these.")
        best = own.places[0]
        display.note(f"The best:\n    import einlinear as el\n    el.convert(model, {best.structure!r})\n")
    for warning in made.warnings:
        display.warning(warning)
    display.note(f"Map: {made.path}")
