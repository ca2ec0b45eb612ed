"""The command `einlinear recipes`."""

from __future__ import annotations

from einlinear_lab.cli import display
from einlinear_lab.cli.packages import LAB, require


def command() -> None:
    """List the experiments from papers that `einlinear sweep` knows by name, and what each should show."""
    require(LAB)
    from einlinear_lab.sweeps.recipes import load, names

    for name in names():
        recipe = load(name)
        commands = recipe.small.commands or (f"einlinear sweep {name}",)
        minutes = f"{recipe.small.minutes} minutes on two cores" if recipe.small.minutes else "not timed"
        display.note(f"{name}: {recipe.title.strip()} ({recipe.source.strip()})")
        display.note(f"    {recipe.shows.strip()}")
        display.note(f"    {'; '.join(commands)}    ({minutes}; --scale paper is the original)\n")
