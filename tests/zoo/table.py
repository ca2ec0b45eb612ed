"""The table of docs/results/models.md: what became of every kind, what was expected, and where the two differ."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tests.zoo.loop import NOTHING, ROOT, Trial

PAGE = ROOT / "docs/results/models.md"
BEGIN, END = "<!-- made by python -m tests.zoo -->", "<!-- end -->"
COLUMNS = {
    "train": "train",
    "project": "project",
    "builds": "no dense weight",
    "compress": "compress",
    "densify": "densify",
    "generate": "generate",
    "load": "save, load",
    "parts": "load a part",
}
AREAS = {
    "text": "Text",
    "vision": "Vision",
    "audio": "Audio",
    "several inputs": "Several inputs",
    "time series": "Time series",
    "torch.nn": "Modules of torch.nn",
}

# Why layers stay dense: what the report of `el.convert` says, and a note below the table.
LEFT_DENSE = {
    "its weight is tied to": "The output head shares its weight with the embedding. An embedding looks rows up and "
    "cannot be replaced by a linear layer, so the head stays dense and the tie is kept.",
    "is a stack of": "The experts compute more than a gate, an activation and two products, such as biases or limits, "
    "or store their weights in another order, so the stack stays dense.",
    "is never called": "The module around the layer reads its weight and never calls it. A structured layer would be "
    "made dense again in every call, so nothing would be saved.",
    "its forward pass computes something else": "The layer is a subclass of nn.Linear that returns more than a "
    "product, such as a router that also chooses experts.",
}

# What does not work, and why: by kind and step, what the error says, and a note below the table.
_HEAD_ALONE = (
    "there is no dense linear layer to compress",
    "The classifier is the only linear layer, and `el.compress` leaves output heads alone unless they are named in "
    "`layers`. The error lists the convolutions as not considered.",
)
_IN_PLACE = (
    "modified by an inplace operation",
    "The class of transformers changes its state in place, so that no backward pass through it works, dense or "
    "structured.",
)
_STATE = (
    "other tokens without a cache",
    "The dense model of transformers also generates other tokens with a cache than without one.",
)
_NO_LINEAR = (
    "no linear layer",
    "The model consists of convolutions and an LSTM and has no linear layer, as the errors say.",
)
EXPECTED: dict[tuple[str, str], tuple[str, str]] = {
    ("ResNet", "compress"): _HEAD_ALONE,
    ("RegNet", "compress"): _HEAD_ALONE,
    ("PoolFormer", "compress"): _HEAD_ALONE,
    **{("EnCodec", step): _NO_LINEAR for step in ("train", "project", "builds", "compress")},
    ("EnCodec", "densify"): ("there is no structured layer", _NO_LINEAR[1]),
    ("Rwkv", "train"): _IN_PLACE,
    ("Rwkv", "generate"): _STATE,
}


def problems(trials: Iterable[Trial]) -> list[str]:
    """What is not as expected: failures and dense layers without a note, and notes without a failure."""
    found = []
    for trial in trials:
        name = trial.kind.name
        for layer, reason in trial.skipped:
            if not any(text in reason for text in LEFT_DENSE):
                found.append(f"{name}: {layer} stays dense, and there is no note for it: {reason}")
        for step in COLUMNS:
            cell = trial.cells[step]
            expected, _ = EXPECTED.get((name, step), ("", ""))
            if cell in ("", NOTHING):
                if expected:
                    found.append(f"{name}: {step} works now, but is expected to fail: {expected}")
            elif not expected or expected not in cell:
                found.append(f"{name}: {step} fails: {cell}")
    return found


def notes() -> list[str]:
    """All notes, in the order of their numbers."""
    return [*LEFT_DENSE.values(), *dict.fromkeys(note for _, note in EXPECTED.values())]


def row(trial: Trial) -> str:
    """The row of a kind, with the numbers of notes."""
    numbers = {note: f"<sup>{number}</sup>" for number, note in enumerate(notes(), 1)}
    left = [numbers[note] for text, note in LEFT_DENSE.items() if any(text in reason for _, reason in trial.skipped)]
    linear = trial.converted + sum("is a stack of" not in reason for _, reason in trial.skipped)
    cells = [trial.kind.name, f"`{trial.kind.model}`", " ".join([f"{trial.converted} of {linear}", *left])]
    for step in COLUMNS:
        cell = trial.cells[step] or "yes"
        if cell not in ("yes", NOTHING):
            expected, note = EXPECTED.get((trial.kind.name, step), (None, ""))
            cell = f"no {numbers[note]}" if expected and expected in cell else f"**no**: {cell[:200].replace('|', '/')}"
        cells.append(cell)
    return f"| {' | '.join(cells)} |"


def tables(trials: Sequence[Trial]) -> str:
    """A table for every area, and the notes."""
    heading = ["kind", "class", "layers converted", *COLUMNS.values()]
    parts = []
    for area, title in AREAS.items():
        rows = [row(trial) for trial in trials if trial.kind.area == area]
        head = [f"| {' | '.join(heading)} |", f"| {' | '.join(['---'] * len(heading))} |"]
        parts.append("\n".join([f"## {title}", "", *head, *rows]))
    listed = [f"{number}. {note}" for number, note in enumerate(notes(), 1)]
    return "\n\n".join([*parts, "\n".join(["## Notes", "", *listed])])


def write(trials: Sequence[Trial]) -> None:
    """Put the tables into the page, between its two comments."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables(trials)}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def rows_of_page() -> dict[str, str]:
    """The rows that the page has, by kind."""
    made = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    rows = re.findall(r"^\| (.*?) \| .*\|$", made, re.MULTILINE)
    lines = [line for line in made.splitlines() if line.startswith("| ")]
    return {name: line for name, line in zip(rows, lines, strict=True) if name not in ("kind", "---")}
