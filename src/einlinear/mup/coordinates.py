"""The coordinate check: do features, and how much a step changes them, keep their size as the width grows?

After every step the features of a fixed batch are compared with those before it. With the right learning rates the
change is of the same size at every width (Yang et al., arXiv 2203.03466, appendix D.1; Qiu et al., arXiv 2406.06248,
figure 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from einlinear.mup.groups import Base, param_groups
from einlinear.nn.names import as_globs, check_globs, plain_modules

Batch = tuple[Tensor, Tensor]  # inputs and targets, a row per sample

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": partial(torch.optim.AdamW, weight_decay=0.0),  # it would be measured too; weight_decay= asks for it
    "sgd": torch.optim.SGD,
}


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross-entropy of what the model gives for the inputs."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets)


@dataclass(frozen=True)
class Coordinates:
    """What was measured for one layer at one width.

    Attributes:
        width: the width the model was built with.
        layer: the qualified name.
        size: root mean square of the features, averaged over the steps.
        update: root mean square of their change in one step, averaged over the steps.
    """

    width: int
    layer: str
    size: float
    update: float

    @property
    def relative_update(self) -> float:
        """The update over the size: near a constant where the learning rate carries over to this width.

        It leaves out what initialisation does to the size: narrow layers behind a wide input start with small features.
        """
        return self.update / self.size if self.size else math.nan


def coord_check(
    build: Callable[[int], nn.Module],
    widths: Sequence[int],
    batches: Sequence[Batch],
    probe: Tensor,
    *,
    lr: float,
    base: Base,
    layers: str | Sequence[str] = "*",
    steps: int = 100,
    optimizer: str = "adamw",
    loss: Callable[[nn.Module, Batch], Tensor] = cross_entropy,
    progress: Callable[[int, int], None] | None = None,
    **groups: Any,
) -> list[Coordinates]:
    """Train a model briefly at every width and measure how its features move.

    Args:
        build: width -> model, initialised.
        widths: the widths to compare.
        batches: (input, target) pairs, used in turn, again from the start when they run out.
        probe: a fixed input, on which the features are measured, in evaluation mode: dropout is not a change.
        lr: learning rate of the base model.
        base: the model of base width, as for `param_groups`; it may be dense.
        layers: a glob, or several, on qualified names: modules whose output, a tensor of shape (..., features), is
            measured.
        steps: of training, at least one.
        optimizer: "adamw", "adam" or "sgd".
        loss: of a model and a batch, the one that the model is trained on: with a term of the model itself, such as the
            balance of a mixture of experts, where training has one. Default: the cross-entropy of its outputs.
        progress: called with (width, step) after every step.
        **groups: further arguments of `param_groups`, such as structure_aware=False for the control.

    Returns:
        One entry per width and layer, in this order.

    Raises:
        ValueError: a glob that matches no module, modules whose output cannot be measured, an optimizer not listed,
            nothing to train on, and what `param_groups` raises.

    Example:
        >>> import torch, einlinear as el
        >>> def build(width):
        ...     model = torch.nn.Sequential(el.Linear(16, width, "btt"), torch.nn.ReLU(), torch.nn.Linear(width, 10))
        ...     return el.init_(model)
        >>> batch = torch.randn(32, 16), torch.randint(10, (32,))
        >>> base = build(64)
        >>> found = el.coord_check(build, [64, 256], [batch], batch[0], lr=3e-3, base=base, layers="0", steps=3)
        >>> [(c.width, c.layer, c.relative_update < 0.1) for c in found]
        [(64, '0', True), (256, '0', True)]
    """
    if optimizer not in _OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(_OPTIMIZERS)}, not {optimizer!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if not batches:
        raise ValueError("batches is empty: give at least one (input, target) pair to train on")
    found = []
    for width in widths:
        model = build(width)
        settings = param_groups(model, lr, base=base, optimizer=optimizer, **groups)
        stepper = _OPTIMIZERS[optimizer](settings, lr=lr)
        before = _features(model, probe, layers)
        size, update = dict.fromkeys(before, 0.0), dict.fromkeys(before, 0.0)
        for step, batch in enumerate(islice(cycle(batches), steps)):
            stepper.zero_grad()
            loss(model, batch).backward()
            stepper.step()
            after = _features(model, probe, layers)
            for layer, h in after.items():
                size[layer] += _rms(h) / steps
                update[layer] += _rms(h - before[layer]) / steps
            before = after
            if progress:
                progress(width, step + 1)
        found += [Coordinates(width, layer, size[layer], update[layer]) for layer in size]
    return found


@torch.no_grad()
def _features(model: nn.Module, probe: Tensor, layers: str | Sequence[str]) -> dict[str, Tensor]:
    """What the chosen modules give for the probe. The model is left in the modes it was in."""
    features: dict[str, Tensor] = {}
    globs = as_globs(layers, "layers")
    modules = {name: module for name, module in plain_modules(model) if name}
    check_globs(globs, list(modules), "layers", "module")
    chosen = {name: module for name, module in modules.items() if any(fnmatchcase(name, glob) for glob in globs)}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                features[name] = output.detach().clone()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in chosen.items()]
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        model(probe)
    finally:
        for module, mode in training.items():
            module.training = mode
        for handle in handles:
            handle.remove()
    if not features:
        raise ValueError(f"layers: none of {', '.join(chosen)} was called and gave a tensor")
    for name, h in features.items():
        if h.dim() < 2 or h.numel() == 0:
            raise ValueError(f"layers: {name} gives an output of shape {tuple(h.shape)}; it must be (..., features)")
    return features


def _rms(h: Tensor) -> float:
    """The mean over inputs of the root mean square over features."""
    return float(h.float().flatten(0, -2).square().mean(-1).sqrt().mean())
