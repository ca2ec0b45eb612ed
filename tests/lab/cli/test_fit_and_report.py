"""`einlinear fit` and `einlinear report`, from the arguments to what is printed and written."""

import json
import re
import shlex
from pathlib import Path

import pytest
from markupsafe import escape
from tests.lab.cli.command import assert_refused, run
from tests.lab.made_up import run_of, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Dense, and btt that is as good as dense of twice its MACs."""
    for structure, times in (("dense", 1), ("btt", 2)):
        for width in (16, 32, 64):
            macs = 10 * width**2
            write(tmp_path / "out", run_of(structure, width), macs, 3 * (times * macs) ** -0.12)
    return tmp_path / "out"


def rows(out: str) -> list[list[str]]:
    return [line.split() for line in out.splitlines() if line.startswith(("dense ", "btt "))]


def test_fit_prints_exponents_multipliers_and_predictions(folder: Path, tmp_path: Path) -> None:
    code, out, err = run("fit", folder, "--at", "1M", "--out", tmp_path / "new" / "laws.json")
    assert (code, err) == (0, "")
    assert "train error over MACs per image" in out
    assert "training loss over MACs per image" in out
    error_of_dense, error_of_btt, loss_of_dense, loss_of_btt = rows(out)
    for row in rows(out):
        assert row[1] == "0.1200"
    assert error_of_dense[-2] == "–"
    assert error_of_btt[-2] == loss_of_btt[-2] == "2.00×"
    assert float(loss_of_dense[-1]) == pytest.approx(3 * 1e6**-0.12, rel=1e-3)
    (study,) = json.loads((tmp_path / "new" / "laws.json").read_text())
    assert [laws["metric"] for laws in study["laws"]] == ["train_error", "train_loss"]
    assert study["laws"][1]["structures"][1]["predictions"][0]["loss"] == pytest.approx(3 * 2e6**-0.12)


def test_an_assumed_floor_changes_the_law_and_one_that_cannot_be_fitted_is_said(folder: Path) -> None:
    assert rows(run("fit", folder, "--floor", "0.1")[1])[0][1] != "0.1200"
    code, out, _ = run("fit", folder, "--floor", "fit")
    assert code == 0
    assert "dense: no exponent: a law needs at least 4 points on the frontier, since any 3 lie on one" in out


def test_two_models_have_no_exponent_and_few_ones_no_certainty(tmp_path: Path, folder: Path) -> None:
    for width in (16, 32):
        write(tmp_path / "two", run_of("dense", width), 10 * width**2, 3 / width)
    code, out, _ = run("fit", tmp_path / "two", "--at", "1M", "--out", tmp_path / "laws.json")
    assert code == 0
    assert rows(out)[0] == ["dense", *8 * "–"]
    reason = "at least 3 points on the frontier, since any 2 lie on one, but there are 2: train models of more sizes"
    assert f"dense: no exponent: a law needs {reason}" in out
    (law,) = json.loads((tmp_path / "laws.json").read_text())[0]["laws"][0]["structures"]
    assert "exponent" not in law
    assert "dense: R² of 3 points means little, rely on the interval" in run("fit", folder)[1]


def test_report_prints_the_table_and_writes_the_page(folder: Path, tmp_path: Path) -> None:
    code, out, err = run("report", folder)
    assert (code, err) == (0, "")
    assert (folder / "report.html").exists()
    assert [row[:2] for row in rows(out)] == [[s, w] for s in ("dense", "btt") for w in ("16", "32", "64")]
    assert rows(out)[0][2] == "2,560"
    assert rows(out)[3][-7:] == ["2.00×", "<", "1.00×", "2,683", "4.56", "7.9", "1"]
    assert re.search(r"compute multiplier +time multiplier +parameters +ms per step +MB +seeds", out)
    write(tmp_path / "more", run_of("monarch", 16), 1000, 0.5, code="v2")
    code, out, err = run("report", folder, tmp_path / "more", "--out", tmp_path / "pages" / "both.html")
    assert code == 0
    assert "monarch" in (tmp_path / "pages" / "both.html").read_text()
    assert "2 versions of the code" in err


@pytest.mark.parametrize("options", [[], ["--floor", "0.1"], ["--floor", "fit"]])
def test_the_page_says_what_makes_it(options: list[str], folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a page.html"
    assert run("report", folder, "--out", out, *options)[0] == 0
    assert escape(shlex.join(["einlinear", "report", str(folder), "--out", str(out), *options])) in out.read_text()


def test_a_damaged_run_is_told(folder: Path) -> None:
    victim = next((folder / "runs").glob("btt*"))
    (victim / "result.json").write_text("{")
    code, _, err = run("report", folder)
    assert code == 0
    assert f"the run in {victim} cannot be read" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fit", "nowhere"), "nowhere holds no results of einlinear (nowhere/runs is missing); name the folder"),
        (("fit", "out", "--floor", "high"), "--floor must be a number of at least 0, or fit, not 'high'"),
        (("report", "out", "--floor", "-1"), "--floor must be"),
        (("fit", "out", "--at", "soon"), "--at: 'soon' is no number"),
        (("report", "out", "out"), "2 folders: name the file for the page (--out)"),
        (("report", "."), ". holds no results of einlinear"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: tuple[str, ...], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    assert_refused(run(*arguments), message)


def test_fit_takes_rules_for_the_frontier_of_training(folder: Path) -> None:
    assert run("fit", folder, "--window", "1k,1T", "--prune", "--tolerance", "0.05")[0] == 0
    assert_refused(run("fit", folder, "--window", "1T"), "must be two numbers")
    assert_refused(run("fit", folder, "--window", "1T,1k"), "from the least to the most")
