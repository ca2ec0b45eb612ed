"""Coordinate checks on disk."""

import json
import math
from pathlib import Path

import pytest

from einlinear.experiments.findings.updates import FILE, Updates, read_updates, write_updates

UPDATES = [Updates("dense", True, {16: 0.1, 64: 0.2}), Updates("btt", False, {16: 0.1, 64: math.inf})]


def test_they_come_back_and_divergence_is_null(tmp_path: Path) -> None:
    path = write_updates(tmp_path / "new", UPDATES, "einlinear coord-check", "Digits")
    found = read_updates(tmp_path / "new")
    assert found is not None
    assert (found.command, found.source) == ("einlinear coord-check", "Digits")
    assert found.updates[0] == UPDATES[0]
    assert found.updates[0].largest_over_smallest == pytest.approx(2)
    assert math.isnan(found.updates[1].by_width[64])
    assert found.updates[1].largest_over_smallest is None
    assert json.loads(path.read_text())["updates"][1]["by_width"] == {"16": 0.1, "64": None}


def test_none_and_damaged(tmp_path: Path) -> None:
    assert read_updates(tmp_path) is None
    for content in ("{", "[]", '{"format": 9}', '{"format": 1, "updates": [{}]}', '{"format": 1, "updates": 3}'):
        (tmp_path / FILE).write_text(content)
        with pytest.raises(ValueError, match=r"the coordinate check in .* cannot be read"):
            read_updates(tmp_path)
