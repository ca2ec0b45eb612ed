"""`einlinear sweep` and `einlinear recipes`."""

from pathlib import Path

import pytest
from tests.lab.cli.command import assert_refused, run

from einlinear_lab.runs.store import Store


@pytest.mark.usefixtures("trained")
def test_a_sweep_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "sizes.toml"
    path.write_text('[config]\ndata = "digits"\nsteps = 9\ndepth = 1\n[grid]\nstructure = ["dense", "btt"]\n')
    code, out, _ = run("sweep", path, "width=16", "--out", tmp_path / "out")
    assert code == 0
    assert "2 runs to do" in out
    assert {record.run.model.width for record in Store(tmp_path / "out").records()} == {16}


def test_runs_of_a_sweep_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "sizes.toml"
    path.write_text('[config]\ndata = "digits"\nsteps = 9\nwidth = 16\n[grid]\nstructure = ["dense", "btt"]\n')
    code, _, err = run("sweep", path, "--interleave", "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    records = Store(tmp_path / "out").records()
    assert len(records) == 2
    assert all(record.result for record in records)
    assert {record.run.training.checkpoint_every for record in records} == {1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lr-tranfer",), "lr-transfer"),
        (("lr-transfer", "device=cuda"), "this torch finds no CUDA device"),
        (("lr-transfer", "--scale", "huge"), "huge"),
        (("feature-updates",), "einlinear coord-check"),
        (("lr-transfer", "--gpus", "0"), "--gpus goes with --on ray"),
        (("lr-transfer", "--cpus", "1"), "--cpus goes with --on ray"),
        (("lr-transfer", "--address", "auto"), "--address goes with --on ray"),
        (("lr-transfer", "--on", "ray", "--workers", "2"), "--workers goes with --on local"),
        (("lr-transfer", "--interleave", "--workers", "2"), "--workers has no meaning with --interleave"),
        (("lr-transfer", "--interleave", "--on", "ray"), "--interleave goes with --on local"),
        (("absent.toml", "--scale", "small"), "--scale is that of a recipe, and absent.toml is a file"),
        (("lr-transfer", "--on", "slurm"), "--on must be local or ray, not 'slurm'"),
        (("absent.toml",), "absent.toml does not exist; give a .toml or .json file, or the name of a recipe"),
        (("image-mlp", "--scale", "paper"), "data/cifar-10"),
    ],
)
def test_a_sweep_that_cannot_be(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    assert_refused(run("sweep", *arguments, "--out", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


def test_recipes_are_listed() -> None:
    code, out, _ = run("recipes")
    assert code == 0
    assert "einlinear sweep lr-transfer" in out
    assert "einlinear coord-check" in out
