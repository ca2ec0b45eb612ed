"""Two processes on gloo: the losses, learning rates and checkpoints of one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.training import toy

from einlinear.training import checkpoint


def torchrun(folder: Path, options: dict[str, Any]) -> list[float]:
    folder.mkdir(parents=True, exist_ok=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, toy.__file__, str(folder), json.dumps(options)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    losses: list[float] = json.loads((folder / "done.json").read_text())[0]
    return losses


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_follow_one(tmp_path: Path, parallel: str) -> None:
    options: dict[str, Any] = {"steps": 50, "checkpoint_every": 25, "clip": 1.0, "schedule": "constant"}
    alone = toy.run(tmp_path / "alone", **options)
    together = torchrun(tmp_path / "together", options | {"parallel": parallel, "accumulate": 2})
    assert together == pytest.approx(alone.losses, rel=1e-4)

    # One process goes on from what two have saved, and exactly as it does from what it then saves itself.
    saved = checkpoint.latest(tmp_path / "together" / "checkpoints")
    own = checkpoint.latest(tmp_path / "alone" / "checkpoints")
    assert saved is not None
    assert own is not None
    assert saved.step == 50
    assert {name: tensor.shape for name, tensor in saved.tensors.items()} == {
        name: tensor.shape for name, tensor in own.tensors.items()
    }
    longer = options | {"steps": 60, "checkpoint_every": 5}
    first = toy.run(tmp_path / "together", **longer)
    assert first.losses[:50] == tuple(together)
    newest = max((tmp_path / "together" / "checkpoints").iterdir())
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    assert toy.run(tmp_path / "together", **longer).losses == first.losses
