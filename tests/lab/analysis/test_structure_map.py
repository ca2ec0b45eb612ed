"""The map of structures: which models are on it, what is fitted, and what the page shows of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tests.lab.cli.command import assert_refused, run
from tests.lab.made_up import run_of, write

import einlinear as el
from einlinear_lab.analysis.comparison import compare_runs
from einlinear_lab.analysis.structure_map import kind_of, map_of
from einlinear_lab.runs.store import Store

THETAS = [
    "1, 0, 0, 0, 1, 0, 1/2",
    "1, 0, 0, 0, 1, 0, 3/4",
    "1/2, 1/2, 0, 1/2, 1/2, 0, 0",
    "1/2, 1/2, 0, 1/2, 1/2, 0, 1/4",
    "1/2, 0, 1/2, 0, 1/2, 1/2, 0",
    "1/2, 0, 1/2, 0, 1/2, 1/2, 1/4",
    "2/3, 0, 1/3, 0, 2/3, 1/3, 0",
    "1/2, 1/4, 1/4, 1/4, 1/2, 1/4, 0",
    "1/2, 1/4, 1/4, 1/4, 1/2, 1/4, 1/4",
]
SPECS = [f"einsum(theta=({theta}))" for theta in THETAS]


def loss_of(spec: str) -> float:
    """Sharing costs a factor of e^0.3, a lower rank e^0.5 for a unit, nu nothing."""
    s = el.structure(spec, 64, 256)
    return 0.8 * math.exp(0.3 * s.omega + 0.5 * (1 - s.psi))


def searched(folder: Path, specs: list[str] = SPECS) -> None:
    for n, spec in enumerate(specs):
        write(folder, run_of(spec, 64), 100_000 + 500 * n, loss_of(spec))
    write(folder, run_of("dense", 128), 300_000, 0.1)  # of another compute


def test_effects_and_places(tmp_path: Path) -> None:
    searched(tmp_path)
    (comparison,) = compare_runs(Store(tmp_path).records())
    found = map_of(comparison, "train_loss")
    assert found is not None
    assert {own.structure for own in found.points} == set(SPECS)
    assert [own.loss for own in found.points] == sorted(map(loss_of, SPECS))
    assert found.regression.omega.value == pytest.approx(0.3)
    assert found.regression.psi.value == pytest.approx(-0.5)
    assert found.regression.nu.value == pytest.approx(0, abs=1e-9)
    assert [own.is_pareto for own in found.points] == [True] + [False] * 8  # all are equally fast
    assert abs(found.compute / 102_000 - 1) < 0.03


def test_too_few_structures_make_no_map(tmp_path: Path) -> None:
    searched(tmp_path, SPECS[:7])
    (comparison,) = compare_runs(Store(tmp_path).records())
    assert map_of(comparison, "train_loss") is None
    assert_refused(run("map", tmp_path), "a map needs 8 structures of about the same MACs")


def test_the_command_and_the_page(tmp_path: Path) -> None:
    searched(tmp_path)
    code, out, _ = run("map", tmp_path)
    assert code == 0
    best = min(SPECS, key=loss_of)
    assert f"el.convert(model, {best!r})" in out
    assert "+0.300" in out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Structure map" in page
    assert 'download="map.csv"' in page
    assert "9 structures at 102k MACs per image" in page


@pytest.mark.parametrize(
    ("spec", "kind"),
    [*zip(
        [*SPECS, "btt(rank=2)", "(g a), g r a, g e r -> (g e) where g=2, r=3"],
        ["low rank"] * 2 + ["Kronecker", "tensor train"] + ["BTT"] * 2 + ["BTT of low rank"] + ["other einsum"] * 2
        + ["btt", "pattern"],
        strict=True,
    )],
)  # fmt: skip
def test_kinds(spec: str, kind: str) -> None:
    assert kind_of(spec) == kind
