"""`einlinear search`, and comparing what it found."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.lab.cli.command import assert_refused, run

from einlinear_lab.cli.running import command_line
from einlinear_lab.runs.store import Store

QUICK = ("data=digits", "steps=6", "depth=1", "batch_size=128", "--budget", "8k")


@pytest.mark.slow
def test_a_search_and_its_confirmation(tmp_path: Path) -> None:
    out = tmp_path / "found"
    code, said, _ = run("search", *QUICK, "--trials", 3, "--workers", 1, "--no-prune", "--out", out)
    assert code == 0
    assert "0 of 3 trials are done" in said
    assert "el.convert(model, " in said
    code, said, _ = run("search", *QUICK, "--trials", 4, "--workers", 1, "--no-prune", "--out", out)
    assert code == 0
    assert "3 of 4 trials are done" in said
    assert "4 trials, 0 of them" in said

    again = ("--seeds", 1, "--workers", 1, "--out")
    structures = ("--structures", f"dense; from-study:{out}")
    code, said, _ = run("compare", *structures, *again, tmp_path / "confirmed")
    assert code == 0
    assert "4 runs to do" in said  # at the budget of the search, with its data and its steps
    records = Store(tmp_path / "confirmed").records()
    assert {record.run.seed for record in records} == {1}  # the run that was chosen is not one of them
    assert {record.run.training.steps for record in records} == {6}
    assert {record.run.data.data for record in records} == {"digits"}
    assert all(record.result and abs(record.result.macs / 8_000 - 1) <= 0.05 for record in records)

    code, said, _ = run(
        "compare", *structures, "--epochs", 1, "--preset", "demo", "--widths", 16, *again, tmp_path / "epoch"
    )
    assert code == 0
    assert {record.run.training.steps for record in Store(tmp_path / "epoch").records()} == {11}

    code, said, _ = run("compare", *structures, "--macs", "8k,16k", "--dense-reach", 1, *again, tmp_path / "compared")
    assert code == 0
    assert "5 runs to do" in said


def test_a_language_model_is_confirmed_as_it_was_searched(tmp_path: Path) -> None:
    gpt = ("model=gpt", "data=pixels:digits", "image_size=4", "depth=1", "steps=2", "batch_size=8", "--budget", "8k")
    code, *_ = run("search", *gpt, "--trials", 2, "--workers", 1, "--out", tmp_path / "found")
    assert code == 0
    structures = ("--structures", f"dense; from-study:{tmp_path / 'found'}")
    code, *_ = run("compare", *structures, "--seeds", 1, "--workers", 1, "--out", tmp_path / "confirmed")
    assert code == 0
    found = {record.run.model for record in Store(tmp_path / "found").records()}  # of heads whose size is left open
    confirmed = Store(tmp_path / "confirmed").records()
    assert found < {record.run.model for record in confirmed}
    assert all(record.result and abs(record.result.macs / 8_000 - 1) <= 0.05 for record in confirmed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "10k,20k"), "--budget is one number, such as 400k, not '10k,20k'"),
        (("--budget", "much"), "--budget: 'much' is no number"),
        (("--sampler", "grid"), "sampler must be gp, tpe, random, not 'grid'"),
        (("--families", "monarch"), "families must be some of einsum, btt3, blast, dyad, not monarch"),
        (("--on", "slurm"), "--on must be local or ray, not 'slurm'"),
        (("--gpus", "1"), "--gpus goes with --on ray"),
        (("--on", "ray", "--workers", "2"), "--workers goes with --on local"),
        (("--storage", "nonsense"), "storage must be journal or the URL of a database, not 'nonsense'"),
        (("trials=5",), "has no option 'trials'"),
        (("experts=4",), "a search has no mixtures of experts"),
        (("--hours", "-1"), "hours must be positive, not -1"),
        (("structure=btt",), "structure cannot be set: the search chooses them"),
        (("stepz=9",), "Did you mean 'steps'?"),
        (("device=cuda",), "this torch finds no CUDA device"),
    ],
)
def test_a_search_that_cannot_be(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    assert_refused(run("search", *QUICK, *arguments, "--out", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


def test_a_comparison_of_a_search_that_is_not_there(tmp_path: Path) -> None:
    assert_refused(run("compare", "--structures", f"from-study:{tmp_path}"), "holds no results of einlinear")


def test_passwords_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["einlinear", "search", "--storage", "postgresql+psycopg://me:secret@host/name"])
    assert command_line() == "einlinear search --storage 'postgresql+psycopg://me:***@host/name'"
    monkeypatch.setattr("sys.argv", ["einlinear", "search", "--storage", "postgresql+psycopg://me@host:5432/name"])
    assert command_line() == "einlinear search --storage postgresql+psycopg://me@host:5432/name"
