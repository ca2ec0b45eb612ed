"""A small task and model; as a script, a training run of them that can be started by torchrun, killed and continued.

python tests/training/toy.py FOLDER '{"steps": 30, "checkpoint_every": 5}' [SECONDS PER STEP]
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import einlinear as el
from einlinear.data.draws import torch_draws
from einlinear.nn import ResidualMLP
from einlinear.training import Outcome, Training, train


class Toy:
    """Regression to a fixed function of normal inputs."""

    def __init__(self, pause: float = 0.0) -> None:
        self.pause = pause

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        time.sleep(self.pause)
        return self._drawn(step, stream=0)

    def _drawn(self, step: int, stream: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(16, 12, generator=torch_draws(0, step, stream))
        return x, torch.stack([x[:, :6].sum(1), x.prod(1)], 1)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.mse_loss(model(x).float(), y)

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        x, y = self._drawn(0, stream=1)
        return {"error": float(F.mse_loss(model(x.to(device)).float(), y.to(device)))}


def build(width: int = 16, structure: str = "btt", dtype: torch.dtype = torch.float32) -> nn.Module:
    return ResidualMLP(12, width, 2, depth=2, structure=structure).to(dtype)


def initialised(structure: str = "btt") -> nn.Module:
    torch.manual_seed(0)
    return el.init_(build(structure=structure), zero=ResidualMLP.ZERO)


def run(folder: Path | None = None, pause: float = 0.0, facts: dict[str, Any] | None = None, **options: Any) -> Outcome:
    config = Training(**{"steps": 20, "lr": 1e-2, "threads": 1, **options})
    return train(initialised(), build(8, "dense"), Toy(pause), config, folder, facts=facts)


if __name__ == "__main__":
    outcome = run(Path(sys.argv[1]), float((sys.argv[3:] or ["0"])[0]), **json.loads(sys.argv[2]))
    (Path(sys.argv[1]) / "done.json").write_text(json.dumps([outcome.losses, dict(outcome.measures)]))
