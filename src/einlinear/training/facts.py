"""What identifies a run: facts by name, as JSON values. A folder holds one run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError, saying what differs, if the facts of the run in a folder are not those of this one."""
    differences = [
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    if differences:
        raise ValueError(f"{folder} holds a run of other settings: {'; '.join(differences)}. Name another folder")
