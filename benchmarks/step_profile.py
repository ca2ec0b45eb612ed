"""Where the time of a training step goes: reference models, dense and BTT.

    pip install 'einlinear[lab]'
    python benchmarks/step_profile.py

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
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import einlinear as el
from einlinear_lab.data import Augment, Batches, Images, PixelSequences
from einlinear_lab.models import GPT, ReferenceModel, ResidualMLP, ViT
from einlinear_lab.training import Task, TrainingConfig
from einlinear_lab.training.loop import train_in_steps
from einlinear_lab.training.tasks import Classification, LanguageModel

DATA = "data"
# the first entry that an event, or one that it belongs to, begins with decides; outer events first
CATEGORIES = {
    DATA: (DATA,),
    "optimizer": ("Optimizer.",),
    "weight normalisation": ("_Normalize",),
    "products": ("_Linear", "_SmallLinear", "_FeedForward", "einlinear::", "aten::linear", "aten::addmm", "aten::mm"),
    "attention": ("aten::_scaled_dot_product", "aten::scaled_dot_product"),
    "norms": ("aten::native_layer_norm", "aten::layer_norm"),
    "elementwise": ("aten::gelu", "aten::add", "aten::mul", "aten::sum"),
    "copies": ("aten::copy_", "aten::contiguous", "aten::clone", "aten::_to_copy", "aten::to", "aten::reshape"),
}
OTHER = "other, Python"


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


class Variant:
    """A model in training, some steps at a time.

    Attributes:
        seconds: of every step that counts.
    """

    def __init__(self, name: str, width: int, structure: str, compile: bool) -> None:
        torch.manual_seed(0)
        build, make_task = MODELS[name]
        model, base = build(width, structure), build(64, "dense")
        el.init_(model, base=base, zero=model.ZERO)
        config = TrainingConfig(steps=1_000_000, lr=1e-3, compile=compile)
        self.steps = train_in_steps(model, base, Untested(make_task()), config, lr_scale=model.LR_SCALE)
        self.seconds: list[float] = []

    def measure(self, steps: int) -> None:
        # the first one finds the caches full of another model, or compiles
        next(self.steps)
        for _ in range(steps):
            began = time.perf_counter()
            next(self.steps)
            self.seconds.append(time.perf_counter() - began)

    def shares(self, steps: int) -> Mapping[str, float]:
        """Return the share of every category in the time of a step."""
        next(self.steps)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            began = time.perf_counter()
            for _ in range(steps):
                next(self.steps)
            seconds = time.perf_counter() - began
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
            compiles = (False, True) if arguments.compile else (False,)
            cases = [(spec, compile) for spec in arguments.structures for compile in compiles]
            made = {case: Variant(name, width, *case) for case in cases}
            for _ in range(arguments.rounds):
                for variant in made.values():
                    variant.measure(arguments.steps)
            ms = {case: 1e3 * statistics.median(variant.seconds) for case, variant in made.items()}
            for spec in arguments.structures:
                step, shares = ms[spec, False], made[spec, False].shares(arguments.steps)
                times = [step, *([ms[spec, True]] if arguments.compile else [])]
                cells = [f"{time:.1f}" for time in (*times, *(step * shares.get(column, 0) for column in columns))]
                print(f"| {name} | {width} | `{spec}` | {' | '.join(cells)} |", flush=True)
            for variant in made.values():
                variant.steps.close()


if __name__ == "__main__":
    main()
