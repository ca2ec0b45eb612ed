"""Where the time of a training step goes: reference models, dense and BTT.

    pip install 'einlinear[lab]'
    python examples/step_profile.py

The training loop of the lab trains every model on random data, in float32 with AdamW: MLPs on 256 augmented images of
28 x 28 pixels, ViTs on 64 of these in patches of 4 x 4, GPTs with weight normalisation on 16 sequences of 128 tokens.
The variants of a model and width run in turns, and the table has the medians of all steps. The columns of categories
divide the time by a profile of some further steps, whose own overhead is left out in proportion.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import einlinear as el
from einlinear_lab.data import Augment, Batches, Images, PixelSequences
from einlinear_lab.models import GPT, ReferenceModel, ResidualMLP, ViT
from einlinear_lab.training import Task, Training, train
from einlinear_lab.training.tasks import Classification, LanguageModel

DATA = "data"
# the first entry that an event, or one that it belongs to, begins with decides; outer events first
CATEGORIES = {
    DATA: (DATA,),
    "optimizer": ("Optimizer.", "torch::autograd::AccumulateGrad", "optimizer"),
    "weight normalisation": ("_Normalize",),
    "products": ("_Linear", "_FeedForward", "einlinear::", "aten::linear", "aten::addmm", "aten::mm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product", "aten::scaled_dot_product"),
    "norms": ("aten::native_layer_norm", "aten::layer_norm"),
    "elementwise": ("aten::gelu", "aten::add", "aten::mul", "aten::sum"),
    "copies": ("aten::copy_", "aten::contiguous", "aten::clone", "aten::_to_copy", "aten::to", "aten::reshape"),
}
OTHER = "other, Python"
# steps of a training before those that count
WARMUP = 3


class Untested:
    """A task without its evaluation, with its batches marked for the profiler."""

    ERRORS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, task: Task) -> None:
        self.task = task

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        with record_function(DATA):
            return self.task.batch(step)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.task.loss(model, batch)

    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        return {}


def random_images(count: int, *size: int) -> Images:
    x, y = torch.randn(count, *size), torch.randint(10, (count,))
    return Images("fashion-mnist", "random", x, y, x[:10], y[:10], tuple("0123456789"))


def mlp(width: int, structure: str) -> ReferenceModel:
    return ResidualMLP(784, width, 10, depth=3, structure=structure)


def vit(width: int, structure: str) -> ReferenceModel:
    return ViT(28, width, 10, channels=1, depth=3, structure=structure)


def gpt(width: int, structure: str) -> ReferenceModel:
    return GPT(257, width, 128, depth=3, structure=structure)


def classification(batch_size: int) -> Task:
    images = random_images(4 * batch_size, 1, 28, 28)
    batches = Batches(images, batch_size, seed=0, augment=Augment.suited_to(images), flatten=False)
    return Classification(images, batches)


def next_pixel(batch_size: int) -> Task:
    images = random_images(4 * batch_size, 1, 8, 16)
    return LanguageModel(PixelSequences(images, size=None, batch_size=batch_size, seed=0))


MODELS: dict[str, tuple[Callable[[int, str], ReferenceModel], Callable[[], Task]]] = {
    "mlp": (mlp, lambda: classification(256)),
    "vit": (vit, lambda: classification(64)),
    "gpt": (gpt, lambda: next_pixel(16)),
}


@dataclass
class Variant:
    """A model that is trained a few steps at a time.

    Attributes:
        seconds: of every step that counts.
    """

    model: ReferenceModel
    base: ReferenceModel
    task: Task
    compile: bool = False
    seconds: list[float] = field(default_factory=list)

    def train(self, steps: int, progress: Callable[[int], None]) -> None:
        config = Training(steps=WARMUP + steps, lr=1e-3, compile=self.compile)
        train(
            self.model,
            self.base,
            self.task,
            config,
            lr_scale=self.model.LR_SCALE,
            progress=lambda step, *_: progress(step - WARMUP),
        )

    def measure(self, steps: int) -> None:
        began = 0.0

        def progress(step: int) -> None:
            nonlocal began
            now = time.perf_counter()
            if step > 0:
                self.seconds.append(now - began)
            began = now

        self.train(steps, progress)

    def shares(self, steps: int) -> Mapping[str, float]:
        """Return the share of every category in the time of a step."""
        profiler, began, seconds = profile(activities=[ProfilerActivity.CPU]), 0.0, 0.0

        def progress(step: int) -> None:
            nonlocal began, seconds
            if step == 0:
                profiler.start()
                began = time.perf_counter()
            elif step == steps:
                seconds = time.perf_counter() - began
                profiler.stop()

        self.train(steps, progress)
        found = defaultdict[str, float](float)
        for event in profiler.events() or ():
            found[category(event)] += event.self_cpu_time_total / 1e6 / seconds
        found[OTHER] += 1 - sum(found.values())
        return found


def category(event: Any) -> str:
    """Return the category of an event of the profiler: that of the outermost event around it that has one."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    for name in reversed(names):
        for found, prefixes in CATEGORIES.items():
            if name.startswith(prefixes):
                return found
    return OTHER


def variants(name: str, width: int, structures: list[str], compiles: bool) -> Iterator[tuple[str, bool, Variant]]:
    build, make_task = MODELS[name]
    for structure in structures:
        for compiled in (False, True)[: 1 + compiles]:
            torch.manual_seed(0)
            model, base = build(width, structure), build(64, "dense")
            el.init_(model, base=base, zero=model.ZERO)
            yield structure, compiled, Variant(model, base, Untested(make_task()), compiled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=[*MODELS])
    parser.add_argument("--widths", type=int, nargs="*", default=[256, 512, 1024])
    parser.add_argument("--structures", nargs="*", default=["dense", "btt"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="of a variant in a round")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile of each model as well")
    arguments = parser.parse_args()
    columns = [*CATEGORIES, OTHER]
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; milliseconds\n")
    print(f"| model | width | structure | step |{' torch.compile |' * arguments.compile} {' | '.join(columns)} |")
    print("| --- " * (4 + arguments.compile + len(columns)) + "|")
    for name in arguments.models:
        for width in arguments.widths:
            made = list(variants(name, width, arguments.structures, arguments.compile))
            for _ in range(arguments.rounds):
                for *_, variant in made:
                    variant.measure(arguments.steps)
            ms = {each[:2]: 1e3 * statistics.median(each[2].seconds) for each in made}
            for structure, compiled, variant in made:
                if compiled:
                    continue
                step, shares = ms[structure, False], variant.shares(arguments.steps)
                times = [step, *([ms[structure, True]] if arguments.compile else [])]
                cells = [f"{time:.1f}" for time in (*times, *(step * shares.get(column, 0) for column in columns))]
                print(f"| {name} | {width} | `{structure}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
