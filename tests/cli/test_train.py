"""`einlinear train`."""

import errno
from pathlib import Path

import pytest
from tests.cli.command import TINY, assert_refused, run

from einlinear.cli import display
from einlinear.experiments.runs.records import read_record
from einlinear.experiments.sweeps import workers
from einlinear.files import alone

TRAIN = ("train", "data=digits", "steps=4", "depth=1", "width=16", "threads=1")


def test_train_and_go_on(tmp_path: Path) -> None:
    options = ("data=digits", "structure=btt", "steps=20", "depth=1", "threads=1", "--out", tmp_path / "run")
    code, out, _ = run("train", *options)
    assert code == 0
    record = read_record(tmp_path / "run")
    assert record.result is not None
    assert f"{record.result.train_loss:.4f}" in out
    assert "test accuracy" in out
    assert (tmp_path / "run" / "checkpoints").exists()
    assert run("train", *options)[0] == 0
    assert_refused(run("train", *options, "lr=1e-2"), "lr was 0.003, now 0.01")
    assert_refused(run("train", "data=digits", "--out", tmp_path / "other"), "steps must be given")


@pytest.mark.parametrize("bug", [ValueError, TypeError])
def test_a_bug_in_training_is_no_mistake_of_the_users(
    bug: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise bug("shapes")

    monkeypatch.setattr("einlinear.experiments.runs.execute.training.train", fail)
    with pytest.raises(bug, match="shapes"):
        run(*TRAIN, "--out", tmp_path / "run")
    monkeypatch.setattr(workers, "Workers", lambda *_: fail)
    with pytest.raises(bug, match="shapes"):
        run("compare", *TINY, "--out", tmp_path / "out")


def test_a_full_disk_and_a_folder_in_use_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    (tmp_path / "run").mkdir()
    with alone(tmp_path / "run" / ".lock", ""):
        assert_refused(run(*TRAIN, "--out", tmp_path / "run"), "another process is at work")
    monkeypatch.setattr("einlinear.experiments.runs.execute.training.train", full)
    assert_refused(run(*TRAIN, "--out", tmp_path / "new"), "No space left on device: 'metrics.jsonl'")


def test_another_run_is_refused_before_it_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*TRAIN, "--out", tmp_path / "run")[0] == 0
    monkeypatch.setattr("einlinear.experiments.runs.execute.training.train", None)
    assert_refused(run(*TRAIN, "width=32", "--out", tmp_path / "run"), "width was 16, now 32", "Name another folder")
    monkeypatch.setattr("einlinear.experiments.runs.records.code_version", lambda: "9.9+beef")
    assert_refused(run(*TRAIN, "--out", tmp_path / "run"), "now '9.9+beef'")


def test_a_damaged_run_is_done_again(tmp_path: Path) -> None:
    assert run(*TRAIN, "--out", tmp_path / "run")[0] == 0
    (tmp_path / "run" / "result.json").write_text("{")
    assert run(*TRAIN, "--out", tmp_path / "run")[0] == 0
    assert read_record(tmp_path / "run").result


def test_under_torchrun_the_first_process_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, bars in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        with monkeypatch.context() as patched:
            patched.setattr("rich.console.Console.is_terminal", True)
            assert display.progress().disable is not bars
        code, out, err = run("train", "data=digits", "stps=4", "--out", tmp_path / "run")
        assert (code, out) == (2, "")
        assert ("no option 'stps'" in err) == bars
        answer = run("compare", *TINY, "--out", tmp_path / "out")
        assert answer[0] == 2
        assert ("start this without it" in answer[2]) == bars
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("batch_size=50",), "a batch of 50 cannot be shared equally among 4 processes"),
        (("batch_size=72", "accumulate=4"), "accumulate=4 does not divide the 18 samples of a process"),
        (("tracker=wandb",), "tracker='wandb' needs a package that is not installed: pip install wandb"),
        (("device=cuda",), "this torch finds no CUDA device"),
    ],
)
def test_what_this_machine_cannot_do_is_said_before_anything_is_trained(
    options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr("einlinear.training.trackers.find_spec", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert_refused(run(*TRAIN, *options, "--out", tmp_path / "run"), message)
    assert not (tmp_path / "run").exists()


def test_a_text_that_is_not_there_says_how_to_prepare_it(tmp_path: Path) -> None:
    answer = run("train", "model=gpt", "data=data/absent", "steps=5", "--out", tmp_path / "out")
    assert_refused(answer, "data/absent", "einlinear prepare")
