"""`einlinear compare`: images in, a report out, whatever happens to its runs."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.lab.cli.command import QUICK, TINY, assert_refused, run, said_default

from einlinear_lab.cli.parsing import numbers, specs
from einlinear_lab.pools import local
from einlinear_lab.pools.pool import Event, Job
from einlinear_lab.runs.data_config import ImageDataConfig
from einlinear_lab.runs.execution import execute
from einlinear_lab.runs.run import Run
from einlinear_lab.runs.store import Store
from einlinear_lab.sweeps.compare import CompareConfig


def test_compare_from_images_to_report_and_again(tmp_path: Path, trained: list[Run]) -> None:
    code, out, err = run("compare", *TINY, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    found = Store(tmp_path / "out").records()
    assert len(found) == len(trained) == 4
    for record in found:
        assert record.result is not None
        model = record.run.model
        lines = [
            line for line in out.splitlines() if line.startswith(f"{model.structure} ") and f" {model.width} " in line
        ]
        assert any(f"{record.result.macs:,}" in line and f"{record.result.train_loss:.4f}" in line for line in lines)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "scikit-learn&#39;s digits" in page

    (tmp_path / "out" / "report.html").unlink()
    code, again, _ = run("compare", *TINY, "--out", tmp_path / "out")
    assert (code, len(trained)) == (0, 4)
    assert "0 runs to do" in again
    assert "4 of 4 are already there" in again
    assert (tmp_path / "out" / "report.html").exists()

    code, table, _ = run("report", tmp_path / "out")
    assert code == 0
    assert all(f"{record.result.train_loss:.4f}" in table for record in found if record.result)


@pytest.mark.usefixtures("trained")
def test_options_of_the_comparison_may_be_written_as_those_of_runs(tmp_path: Path) -> None:
    words = ("data=digits", "seeds=2", "epochs=1", "structures=dense;btt", "widths=16,32", "warmup=3", "betas=0.9,0.99")
    code, _, err = run("compare", *words, "batch_size=256", "depth=1", "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    runs = [record.run for record in Store(tmp_path / "out").records()]
    assert {(run.model.structure, run.model.width, run.seed) for run in runs} == {
        (structure, width, seed) for structure in ("dense", "btt") for width in (16, 32) for seed in (0, 1)
    }
    assert {run.training.betas for run in runs} == {(0.9, 0.99)}
    assert {run.training.warmup for run in runs} == {3}


def test_the_clock_lets_runs_take_turns(tmp_path: Path) -> None:
    config = ("data=digits", "steps=10", "depth=1", "seeds=1")
    command = ("compare", *TINY[:6], *config, "--interleave", "--out", tmp_path / "out")
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    assert "4 runs to do" in out
    assert "time multiplier" in out
    records = Store(tmp_path / "out").records()
    assert {record.run.training.evaluate_every for record in records} == {1}
    begun = [(record.folder / "metrics.jsonl").stat().st_ctime_ns for record in records]
    ended = [(record.folder / "result.json").stat().st_ctime_ns for record in records]
    assert min(ended) > max(begun)
    assert "Loss against seconds" in (tmp_path / "out" / "report.html").read_text()
    assert "0 runs to do" in run(*command)[1]
    assert_refused(run(*command, "--workers", 2), "--workers has no meaning with --interleave")


def test_workers_are_processes(tmp_path: Path) -> None:
    code, out, err = run("compare", *TINY, "--widths", 16, "--macs", "20k", "--out", tmp_path / "no")
    assert_refused((code, out, err), "not both")
    options = (*QUICK, "--structures", "dense;btt", "--widths", 16, "--workers", 2, "--out", tmp_path / "out")
    assert run("compare", *options)[0] == 0
    assert len(Store(tmp_path / "out").records()) == 2


@pytest.mark.usefixtures("trained")
def test_an_interrupt_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def impatient(jobs: Sequence[Job]) -> Iterator[Event]:
        first, folder = jobs[0]
        execute(first, folder)
        yield Event(first, "finished")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(local, "LocalPool", lambda *_: impatient)
        code, _, err = run("compare", *TINY, "--out", tmp_path / "out")
    assert code == 130
    assert "keeps what was done; the same command goes on from there" in err
    assert "Traceback" not in err
    assert len(Store(tmp_path / "out").records()) == 1
    code, out, _ = run("compare", *TINY, "--out", tmp_path / "out")
    assert code == 0
    assert "3 runs to do" in out
    assert "1 of 4 are already there" in out


def test_a_failed_run_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(jobs: Sequence[Job]) -> Iterator[Event]:
        first, *others = jobs
        yield Event(first[0], "failed", message="no more memory")
        for one, folder in others:
            execute(one, folder)
            yield Event(one, "finished")

    monkeypatch.setattr(local, "LocalPool", lambda *_: failing)
    code, _, err = run("compare", *TINY, "--out", tmp_path / "out")
    assert code == 1
    assert "failed: no more memory" in err
    assert len(Store(tmp_path / "out").records()) == 3


@pytest.mark.usefixtures("trained")
def test_a_diverged_run_is_shown_and_others_go_on(tmp_path: Path) -> None:
    code, out, _ = run("compare", *TINY, "--lr", 1e30, "--out", tmp_path / "out")
    assert code == 0
    assert sum("diverged" in line for line in out.splitlines() if line.startswith(("dense", "btt"))) == 4


def test_a_truncated_run_is_reported(tmp_path: Path, trained: list[Run]) -> None:
    run("compare", *TINY, "--out", tmp_path / "out")
    victim = Store(tmp_path / "out").path(trained[1])
    (victim / "result.json").write_text("{")
    code, _, err = run("compare", *TINY, "--out", tmp_path / "out")
    assert (code, len(trained)) == (0, 5)
    assert f"the run in {victim} cannot be read" in err


def test_a_folder_of_other_settings_is_refused(tmp_path: Path, trained: list[Run]) -> None:
    run("compare", *TINY, "--out", tmp_path / "out")
    answer = run("compare", *TINY, "--lr", 0.01, "--out", tmp_path / "out")
    assert_refused(answer, "lr was 0.003, now 0.01", "Name another folder")
    assert len(trained) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--structures", "dense;bttt"), "Did you mean 'btt'"),
        (("--structures", "(g a), g r f a, f e g r -> (f e"), "expected ')'"),
        (("--macs", "50k,many"), "--macs: 'many' is no number"),
        (("--macs", "50k", "--widths", "64"), "not both"),
        (("--macs", "1k"), "the cheapest model takes"),
        (("--widths", ","), "--widths is empty"),
        (("--widths", "64.5"), "--widths: '64.5' is not a whole number"),
        (("--preset", "paper-ish"), "the presets are demo, paper"),
        (("macs=50k,many",), "--macs: 'many' is no number"),
        (("preset=paper-ish",), "the presets are demo, paper"),
        (("seeds=two",), "seeds should be a valid integer"),
        (("--epochs", "2", "steps=9"), "not both"),
        (("--batch-size", "5000"), "batch_size=5000"),
        (("--batchsize", "50"), "no option 'batchsize'. Did you mean 'batch_size'"),
        (("wide",), "'wide' sets no option; write NAME=VALUE"),
        (("lr=",), "'lr=' has no value"),
        (("width=64",), "width cannot be set: a comparison varies"),
        (("--data", "digts"), "Did you mean 'digits'"),
        (("--data", "no/such/folder"), "does not exist"),
        (("--tracker", "comet"), "tracker must be None or tensorboard or wandb or mlflow, not 'comet'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(
    arguments: tuple[str, ...], message: str, tmp_path: Path, trained: list[Run]
) -> None:
    assert_refused(run("compare", *QUICK, "--out", tmp_path / "out", *arguments), message)
    assert trained == []
    assert not (tmp_path / "out").exists()


def test_the_help_says_the_defaults() -> None:
    config = CompareConfig()
    assert specs(said_default("compare", "structures")) == config.structures
    assert numbers(said_default("compare", "macs"), "--macs") == config.macs
    for name in ("dense_reach", "seeds", "epochs"):
        assert int(said_default("compare", name)) == getattr(config, name)
    assert said_default("compare", "data") == ImageDataConfig().data


def test_an_empty_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    answer = run("compare", *QUICK, "--data", tmp_path / "images", "--out", tmp_path / "out")
    assert_refused(answer, "neither subfolders nor images")


def test_an_image_with_nan_pixels(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(3):
            pixels = np.full((8, 8), np.nan if (label, i) == ("dog", 1) else 0.5 + i, dtype=np.float32)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{i}.tif")
    answer = run("compare", *QUICK, "--data", tmp_path / "images", "--out", tmp_path / "out")
    assert_refused(answer, "NaN", "1.tif")


@pytest.mark.usefixtures("trained")
def test_a_folder_of_images(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(10):
            pixels = random.integers(0, 256, (6, 7, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{i}.png")
    options = (*TINY, "--data", tmp_path / "images", "--batch-size", 4, "--image-size", 6, "limit=8")
    code, out, _ = run("compare", *options, "--out", tmp_path / "out")
    assert code == 0
    assert "4 runs to do" in out
