"""The main result in a sentence, and what was run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from einlinear_lab.findings.summary import Study, in_words, result
from einlinear_lab.report.page import Section, definitions, paragraphs
from einlinear_lab.runs.models import DENSE
from einlinear_lab.runs.records import Record

_AT_MOST = 12  # values of an option that are listed


def headline(study: Study) -> str:
    """The main result in one sentence: the largest compute multiplier, of the error."""
    what = in_words(study.error)
    found = [(row, own.mean) for row in study.rows if (own := row.multipliers.get(study.error))]
    gains = [(row, mean) for row, mean in found if mean and mean.value > 1 and mean.bound != "<"]
    others = [curve for curve in study.curves if curve.structure != DENSE]
    if not found or not others:
        return f"{len(study.records)} runs of {study}: without dense and another structure, nothing to compare."
    if not gains:
        return f"No structure reached its {what} with fewer MACs than dense needs for the same."
    row, mean = max(gains, key=lambda gain: gain[1].value)
    return (
        f"Largest compute multiplier: dense needs {'more than ' if mean.bound else ''}{mean.value:.1f} times the MACs "
        f"of {row.curve} at width {row.run.model.width} ({row.result.macs:,} per {study.input}) for the same {what}."
    )


def what_was_run(study: Study, commands: Sequence[str], unfinished: int) -> Section:
    """Model, data, what varies and what does not."""
    run, records = study.records[0].run, study.records
    diverged = sum(result(record).diverged for record in records)
    count = f"{len(records)} finished runs, of which {diverged} diverged"
    models = " and ".join(dict.fromkeys(record.run.model.NAME for record in records))
    sentences = [
        f"{count}{f'; {unfinished} more are not finished' if unfinished else ''}. Models: {models}, trained on "
        f"{run.data.data}: {records[0].source.rstrip('.')}.",
        f"Their quality is their {in_words(study.error)}; compute is counted in multiply-accumulates (MACs) of a "
        f"forward pass, for one {study.input}.",
    ]
    varied = {_term(name): f"{_listed(values)} ({len(values)})" for name, values in study.varied.items()}
    fixed = {_term(name): _listed([value]) for name, value in run.identity.items() if name not in study.varied}
    text = paragraphs([*sentences, "What varies:" if varied else "Nothing varies."])
    if varied:
        text += definitions(varied)
    text += Markup("<details><summary>{} settings that all runs share</summary>{}</details>").format(
        len(fixed), definitions(fixed)
    )
    text += Markup("<p>Made by:</p>") + Markup().join(Markup("<pre>{}</pre>\n").format(line) for line in commands)
    return Section("What was run", text)


def code_warning(records: Sequence[Record]) -> list[str]:
    """The warning that several versions of the code made the runs; none where one made all of them."""
    codes: dict[str, int] = {}
    for record in records:
        codes[record.code] = codes.get(record.code, 0) + 1
    if len(codes) < 2:
        return []
    listed = ", ".join(f"{count} by {code}" for code, count in sorted(codes.items()))
    return [
        f"These runs were made by {len(codes)} versions of the code ({listed}), which may not be comparable. The table "
        "of all runs says which is whose."
    ]


def _term(name: str) -> str:
    return name.replace("_", " ")


def _listed(values: Sequence[Any]) -> str:
    words = [value if isinstance(value, str) else json.dumps(value) for value in values]
    if len(words) > _AT_MOST:
        words = [*words[: _AT_MOST - 1], "…", words[-1]]
    return "; ".join(words) if any("," in word for word in words) else ", ".join(words)
