"""Small tasks and models. As a script, runs of them that torchrun can start:

torchrun --nproc-per-node 2 tests/lab/training/toy.py FOLDER '{"a": {"kind": "gpt", "parallel": "fsdp"}, "b": {...}}'
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import einlinear as el
from einlinear_lab.data import Images, PixelSequences
from einlinear_lab.data.sampling import torch_generator
from einlinear_lab.models import GPT, ReferenceModel, ResidualMLP
from einlinear_lab.training import Outcome, Task, TrainingConfig, train
from einlinear_lab.training.loop import Progress
from einlinear_lab.training.tasks import LanguageModel


class Toy:
    """Regression to a fixed function of normal inputs."""

    def __init__(self, pause: float = 0.0) -> None:
        self.pause = pause

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        time.sleep(self.pause)
        return self._drawn(step, stream=0)

    def _drawn(self, step: int, stream: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(16, 12, generator=torch_generator(0, step, stream))
        return x, torch.stack([x[:, :6].sum(1), x.prod(1)], 1)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.mse_loss(model(x).float(), y)

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        x, y = self._drawn(0, stream=1)
        return {"error": float(F.mse_loss(model(x.to(device)).float(), y.to(device)))}


def pixels() -> LanguageModel:
    """The next pixel of images of 16 pixels, each a little brighter or darker than the one before."""
    x = torch.randn(80, 16, generator=torch_generator(0, 0)).cumsum(1).view(80, 1, 4, 4)
    y = torch.zeros(80, dtype=torch.int64)
    images = Images("pixels", "made up", x[:64], y[:64], x[64:], y[64:], ("all",))
    return LanguageModel(PixelSequences(images, size=None, batch_size=16, seed=0))


def build(width: int = 16, structure: str = "btt") -> ReferenceModel:
    return ResidualMLP(12, width, 2, depth=2, structure=structure)


def build_gpt(width: int = 32, structure: str = "btt", **options: Any) -> ReferenceModel:
    options = {"normalize": False, **options}
    return GPT(257, width, 16, depth=2, d_head=16, structure=structure, bias=True, **options)


def initialised(builder: Callable[..., ReferenceModel], **options: Any) -> ReferenceModel:
    torch.manual_seed(0)
    model = builder(**options)
    el.init_(model, zero=model.ZERO)
    return model


def run(
    folder: Path | None = None,
    pause: float = 0.0,
    metadata: dict[str, Any] | None = None,
    progress: Progress | None = None,
    model: ReferenceModel | None = None,
    **options: Any,
) -> Outcome:
    config = TrainingConfig(**{"steps": 20, "lr": 1e-2, "threads": 1, **options})
    model = model or initialised(build)
    return train(model, build(8, "dense"), Toy(pause), config, folder, metadata=metadata, progress=progress)


@contextmanager
def last_step(model: nn.Module) -> Iterator[dict[str, tuple[float, Tensor | None]]]:
    """Of every parameter, by name: its learning rate in the last step, and how many steps Adam has counted."""
    found: dict[str, tuple[float, Tensor | None]] = {}

    def spy(optimizer: torch.optim.Optimizer, *_: object) -> None:
        names = {id(p): name for name, p in model.named_parameters()}
        for group in optimizer.param_groups:
            for p in group["params"]:
                found[names[id(p)]] = group["lr"], optimizer.state.get(p, {}).get("step")

    hook = register_optimizer_step_post_hook(spy)
    try:
        yield found
    finally:
        hook.remove()
        for name in found.keys() - {name for name, _ in model.named_parameters()}:  # that it had before
            del found[name]


def run_gpt(folder: Path, model: dict[str, Any] | None = None, **options: Any) -> tuple[Outcome, dict[str, float]]:
    """What a run came to, and the learning rate of every parameter in its last step, by the name that it has."""
    model = initialised(build_gpt, **(model or {}))
    task: Task = pixels()
    with last_step(model) as found:
        outcome = train(model, build_gpt(16, "dense"), task, TrainingConfig(**{"threads": 1, **options}), folder)
    return outcome, {name: lr for name, (lr, _) in found.items()}


if __name__ == "__main__":
    for case, options in json.loads(sys.argv[2]).items():
        folder = Path(sys.argv[1], case)
        outcome, rates = run_gpt(folder, **options)
        (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps([outcome.losses, rates]))
