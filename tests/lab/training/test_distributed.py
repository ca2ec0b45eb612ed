"""Two processes on gloo: the losses, learning rates and checkpoints of one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.lab.training import toy
from tests.processes import made_once

from einlinear import checkpoint

OPTIONS: dict[str, Any] = {"lr": 1e-2, "schedule": "constant", "warmup": 3, "clip": 1.0}
MIXTURES = {"normalize": True, "experts": 4}
CASES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp, normalized": {"model": {"normalize": True}},
    "ddp, guided": {"model": {"normalize": True}, "guide_until": 8},
    "fsdp": {},
    "fsdp, normalized": {"model": {"normalize": True}},
    "fsdp, muon": {"model": {"normalize": True}, "optimizer": "muon"},
    "fsdp, products": {"model": {"normalize": True}, "optimizer": "muon", "product": True},
    "ddp, mixtures": {"model": MIXTURES, "accumulate": 1},
    "fsdp, mixtures": {"model": MIXTURES, "accumulate": 1},
    "experts": {"model": MIXTURES, "accumulate": 1},
    "experts, feed_forward": {"model": MIXTURES | {"routed": "feed_forward"}, "accumulate": 1},
    "experts, muon": {"model": MIXTURES, "accumulate": 1, "optimizer": "muon"},
    "experts, products": {"model": MIXTURES, "accumulate": 1, "optimizer": "muon", "product": True},
}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes have done, one run after the other; once for all processes of pytest."""
    return made_once(tmp_path_factory, "together", run_together)


def run_together(folder: Path) -> None:
    runs = {
        name: OPTIONS | {"steps": 12, "checkpoint_every": 6, "accumulate": 2, "parallel": name.split(",")[0]} | options
        for name, options in CASES.items()
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, toy.__file__, str(folder), json.dumps(runs)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_follow_one(together: Path, tmp_path: Path, case: str) -> None:
    options = OPTIONS | CASES[case]
    alone, rates = toy.run_gpt(tmp_path, steps=18, checkpoint_every=12, **options)
    losses: list[float]
    for rank in (0, 1):
        losses, own_rates = json.loads((together / case / f"rank-{rank}.json").read_text())
        assert losses == pytest.approx(alone.losses[:12], rel=1e-4)
        assert own_rates == rates
    assert losses[-1] < 0.95 * losses[0]
    # both factors of a product have the same rate
    assert len(set(rates.values())) > (1 if "product" in options else 2)
    assert ("blocks.0.attention.out.gamma_A" in rates) == ("model" in options)

    saved, own = (checkpoint.latest(folder / "checkpoints") for folder in (together / case, tmp_path))
    assert saved is not None
    assert own is not None
    assert saved.step == 12
    assert {name: tensor.shape for name, tensor in saved.tensors.items() if name not in ("losses", "seconds")} == {
        name: tensor.shape for name, tensor in own.tensors.items() if name not in ("losses", "seconds")
    }

    # One process goes on from what two have saved, and exactly as it does from what it then saves itself.
    longer = options | {"steps": 18, "checkpoint_every": 3}
    first, _ = toy.run_gpt(together / case, **longer)
    assert first.losses[:12] == tuple(losses)
    assert first.losses == pytest.approx(alone.losses, rel=1e-4)
    shutil.rmtree(together / case / "checkpoints" / "step-00000018")
    again, _ = toy.run_gpt(together / case, **longer)
    assert again.losses == first.losses
    assert again.metrics == first.metrics
