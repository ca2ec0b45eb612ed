"""`einlinear coord-check`."""

import re
from pathlib import Path

import pytest
from tests.lab.cli.command import assert_refused, run

from einlinear_lab import coordinate_check

CHECK = ("coord-check", "--data", "digits", "--widths", "16,64", "--depth", 1, "--batch-size", 64)


def test_coordinate_check(tmp_path: Path) -> None:
    code, out, _ = run(*CHECK, "--steps", 3, "--out", tmp_path / "new" / "check")
    assert code == 0
    rows = [line.split() for line in out.splitlines() if line.startswith(("dense", "btt"))]
    assert [row[0] for row in rows] == ["dense", "btt", "btt"]
    for row in rows:
        small, large = sorted(float(value) for value in row[-3:-1])
        assert 0 < small < large < 10
        assert float(row[-1]) == pytest.approx(large / small, rel=0.01)
    assert rows[1][-3:] != rows[2][-3:]  # its own learning rates, those of dense
    page = (tmp_path / "new" / "check" / "report.html").read_text()
    assert "btt, naive" in page
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=", page)


def test_a_coordinate_check_of_a_structure_that_does_not_fit_the_base_width(tmp_path: Path) -> None:
    arguments = ("--structures", "monarch(blocks=8)", "--widths", "64", "--base-width", 16, "--steps", 2)
    code, out, _ = run(*CHECK, *arguments, "--out", tmp_path / "check")
    assert code == 0
    assert "monarch(blocks=8)" in out


@pytest.mark.parametrize("structures", ["dense", "dense; btt"])
def test_a_diverged_coordinate_check_is_shown(structures: str, tmp_path: Path) -> None:
    arguments = ("--steps", 3, "--lr", 1e30, "--structures", structures, "--out", tmp_path / "check")
    code, out, _ = run(*CHECK, *arguments)
    assert code == 0
    rows = [line.split() for line in out.splitlines() if line.startswith(("dense", "btt"))]
    assert [row[-3:] for row in rows] == len(rows) * [["diverged", "diverged", "–"]]
    assert len(rows) == (1 if structures == "dense" else 3)
    assert (tmp_path / "check" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--structures", "btt;bt"), "unknown family 'bt'"),
        (("--structures", ";"), "--structures is empty"),
        (("--steps", "1"), "steps must be at least 2, not 1: the first moves only the head"),
        (("--widths", "16,64.5"), "--widths: '64.5' is not a whole number"),
        (("heads=2",), "has no option 'heads'"),
        (("optimizer=sgd", "depth=2", "clip=1"), "clip cannot be set: a coordinate check varies"),
        (("structure=btt",), "structure cannot be set: a coordinate check varies structure, width"),
    ],
)
def test_a_coordinate_check_refuses_before_it_trains(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(coordinate_check, "coord_check", None)
    assert_refused(run(*CHECK, *arguments), message)
    assert list(tmp_path.iterdir()) == []
