"""Coordinate check: whether features, and their change in a step, keep their size as the width grows."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from einlinear.mup.base_model import Base
from einlinear.mup.muon import Muon
from einlinear.mup.parametrization import param_groups
from einlinear.nn.model_call import evaluating
from einlinear.nn.names import matching, plain_modules

# inputs and targets, one sample per row
TrainingBatch = tuple[Tensor, Tensor]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "muon": Muon,
}


def cross_entropy(model: nn.Module, batch: TrainingBatch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@dataclass(frozen=True)
class Coordinates:
    """Size of the features of one layer at one width, and of their change in a step.

    Attributes:
        width, layer: the width the model was built with, and the qualified name.
        size, update: root mean square of the features, and of their change in one step, averaged over the steps.
    """

    width: int
    layer: str
    size: float
    update: float

    @property
    def relative_update(self) -> float:
        """The update over the size: about constant if the learning rate carries over to this width."""
        return self.update / self.size if self.size else math.nan


def coord_check(
    build: Callable[[int], nn.Module],
    widths: Sequence[int],
    batches: Sequence[TrainingBatch],
    probe: Tensor,
    *,
    lr: float,
    base: Base,
    layers: str | Sequence[str] | None = None,
    steps: int = 100,
    optimizer: str = "adamw",
    loss: Callable[[nn.Module, TrainingBatch], Tensor] = cross_entropy,
    progress: Callable[[int, int], None] | None = None,
    **groups: Any,
) -> list[Coordinates]:
    """Train a model briefly at every width and return, by width and layer, how much its features change in a step.

    With the right learning rates it is the same at every width (arXiv 2203.03466, appendix D.1; 2406.06248, figure 3).

    Args:
        build, widths: width -> model, initialised, and the widths to compare; or depths, of models whose base may be
            shallower.
        batches: (input, target) pairs, used in turn.
        probe: a fixed input for the measurement, which runs in evaluation mode.
        lr, base: learning rate and model of base width, as for `param_groups`.
        layers: a glob, or several, on qualified names: which modules to measure; their outputs are tensors of shape
            (..., features). None: all.
        steps, optimizer: of training: at least one step, with "adamw", "adam", "sgd" or "muon".
        loss: training loss of a model and a batch. Default: the cross-entropy of the outputs.
        progress: called with (width, step) after every step.
        **groups: further arguments of `param_groups`, such as structure_aware=False for the control.

    Raises:
        ValueError: a glob that matches no module, outputs that cannot be measured, and what `param_groups` raises.

    Example:
        >>> import torch, einlinear as el
        >>> def build(width):
        ...     return el.init_(torch.nn.Sequential(el.Linear(16, width, "btt"), torch.nn.Linear(width, 10)))
        >>> batch = torch.randn(32, 16), torch.randint(10, (32,))
        >>> checked = el.coord_check(build, [64, 256], [batch], batch[0], lr=3e-3, base=build(64), layers="0", steps=3)
        >>> [(c.width, c.layer, c.relative_update < 0.1) for c in checked]
        [(64, '0', True), (256, '0', True)]
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {optimizer!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if not batches:
        raise ValueError("batches is empty: give at least one (input, target) pair to train on")
    results = []
    for width in widths:
        model = build(width)
        scaled = param_groups(model, lr, base=base, optimizer=optimizer, **groups)
        # decay would be measured, too: without weight_decay= there is none
        stepper = OPTIMIZERS[optimizer](scaled, lr=lr, weight_decay=0.0)
        previous = _features(model, probe, layers)
        size, update = dict.fromkeys(previous, 0.0), dict.fromkeys(previous, 0.0)
        for step, batch in enumerate(islice(cycle(batches), steps)):
            model.zero_grad()
            loss(model, batch).backward()
            stepper.step()
            features = _features(model, probe, layers)
            for layer, h in features.items():
                for total, value in ((size, h), (update, h - previous[layer])):
                    rms = value.float().flatten(0, -2).square().mean(-1).sqrt()
                    total[layer] += float(rms.mean()) / steps
            previous = features
            if progress:
                progress(width, step + 1)
        results += [Coordinates(width, layer, size[layer], update[layer]) for layer in size]
    return results


@torch.no_grad()
def _features(model: nn.Module, probe: Tensor, layers: str | Sequence[str] | None) -> dict[str, Tensor]:
    features: dict[str, Tensor] = {}
    modules = {name: module for name, module in plain_modules(model) if name}
    chosen = matching(modules, layers, "layers", "module")

    def record(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            features[name] = output.detach().clone()

    with ExitStack() as stack:
        for name, module in chosen.items():
            stack.callback(module.register_forward_hook(partial(record, name)).remove)
        stack.enter_context(evaluating(model))
        model(probe)
    if not features:
        raise ValueError(f"layers: none of {', '.join(chosen)} was called and returned a tensor")
    for name, h in features.items():
        if h.dim() < 2 or h.numel() == 0:
            raise ValueError(f"layers: {name} has an output of shape {tuple(h.shape)}; it must be (..., features)")
    return features
