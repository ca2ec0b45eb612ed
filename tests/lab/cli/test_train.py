"""`einlinear train`."""

import errno
import json
from pathlib import Path

import pytest
from PIL import Image
from tests.lab.cli.command import TINY, assert_refused, run

from einlinear.files import lock
from einlinear_lab.cli import display
from einlinear_lab.pools import local
from einlinear_lab.runs.records import read_record
from einlinear_lab.runs.run import Run, with_defaults

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
    answer = run("train", *options, "lr=1e-2")
    assert_refused(answer, "lr was 0.003, now 0.01. Name another folder, or repeat the config to resume")


def images(folder: Path, count: int) -> Path:
    for name in ("cat", "dog ü"):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (4, 4), 9 * i).save(folder / name / f"{i}.png")
    return folder


def test_a_folder_is_all_that_a_first_run_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = images(tmp_path / "my pets é", 10)
    command = ("train", "data=my pets é", "depth=1", "width=16", "threads=1", "--skip-broken")
    (folder / "cat" / "0.png").write_bytes(b"no image")
    code, out, err = run(*command)
    assert code == 0
    assert "Left out 1 file of my pets é that cannot be read: cat/0.png." in err
    assert "batch_size=2, as there are 15 training images." in out
    assert "steps=200: 20 passes over 15 training images, but at least 200." in out
    (first,) = (tmp_path / "results" / "train").iterdir()
    assert f"In {first.relative_to(tmp_path)}." in out
    record = read_record(first)
    assert "without cat/0.png, which cannot be read" in record.data_source
    assert record.result is not None
    code, _, err = run(*command, "lr=1e-2", "steps=3")
    assert code == 0, "another run has a folder of its own"
    assert len([*(tmp_path / "results" / "train").iterdir()]) == 2
    before = (first / "result.json").read_bytes()
    assert run(*command)[0] == 0, "and the same one goes on"
    assert json.loads((first / "result.json").read_bytes())["metrics"] == json.loads(before)["metrics"]
    assert run(*command, "steps=3", "out=here")[0] == 0
    assert (tmp_path / "here" / "result.json").exists()
    assert_refused(run(*command[:-1]), "cat/0.png cannot be read as an image", "skip_broken=true (--skip-broken)")


@pytest.mark.parametrize(
    ("options", "steps", "batch"),
    [
        ({"data": "digits"}, 200, 256),
        ({"data": "digits", "batch_size": "1"}, 5000, 1),
        ({"data": "digits", "batch_size": "16"}, 20 * (1439 // 16), 16),
        ({"data": "digits", "limit": "100"}, 200, 16),
        ({"data": "teacher"}, 2000, 1024),
        ({"data": "digits", "steps": "7"}, 7, 256),
    ],
)
def test_steps_follow_from_the_data(options: dict[str, str], steps: int, batch: int) -> None:
    options, why = with_defaults({**options, "warmup": "3"})
    found = Run.of(options)
    assert (found.training.steps, found.data.batch_size, found.training.warmup) == (steps, batch, 3)
    assert any(sentence.startswith(f"steps={steps}") for sentence in why) == (steps != 7)


def test_an_option_of_the_command_is_told_from_one_of_the_run(tmp_path: Path) -> None:
    assert_refused(run("train", tmp_path), f"sets no option; write NAME=VALUE, such as data={tmp_path}")
    (tmp_path / "a.txt").touch()
    for model in ("mlp", "gpt"):
        answer = run("train", f"model={model}", f"data={tmp_path / 'a.txt'}", "steps=3")
        assert_refused(answer, f"einlinear prepare {tmp_path / 'a.txt'} --out FOLDER")
    assert_refused(
        run("compare", "out=here"), "has no option 'out': if the command has it, write --out before its value"
    )


@pytest.mark.parametrize("bug", [ValueError, TypeError])
def test_a_bug_in_training_is_no_mistake_of_the_users(
    bug: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise bug("shapes")

    monkeypatch.setattr("einlinear_lab.runs.execution.train_in_steps", fail)
    with pytest.raises(bug, match="shapes"):
        run(*TRAIN, "--out", tmp_path / "run")
    monkeypatch.setattr(local, "LocalPool", lambda *_: fail)
    with pytest.raises(bug, match="shapes"):
        run("compare", *TINY, "--out", tmp_path / "out")


def test_a_full_disk_and_a_folder_in_use_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    (tmp_path / "run").mkdir()
    with lock(tmp_path / "run" / ".lock", ""):
        assert_refused(run(*TRAIN, "--out", tmp_path / "run"), "another process is at work")
    monkeypatch.setattr("einlinear_lab.runs.execution.train_in_steps", full)
    assert_refused(run(*TRAIN, "--out", tmp_path / "new"), "No space left on device: 'metrics.jsonl'")


def test_another_run_is_refused_before_it_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*TRAIN, "--out", tmp_path / "run")[0] == 0
    monkeypatch.setattr("einlinear_lab.runs.execution.train_in_steps", None)
    assert_refused(run(*TRAIN, "width=32", "--out", tmp_path / "run"), "width was 16, now 32", "Name another folder")
    monkeypatch.setattr("einlinear_lab.runs.records.code_version", lambda: "9.9+beef")
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
    monkeypatch.setattr("einlinear_lab.training.metrics.find_spec", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert_refused(run(*TRAIN, *options, "--out", tmp_path / "run"), message)
    assert not (tmp_path / "run").exists()


def test_a_text_that_is_not_there_says_how_to_prepare_it(tmp_path: Path) -> None:
    answer = run("train", "model=gpt", "data=data/absent", "steps=5", "--out", tmp_path / "out")
    assert_refused(answer, "data/absent", "einlinear prepare")
