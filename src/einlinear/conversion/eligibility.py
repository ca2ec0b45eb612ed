"""Eligibility: whether a structured layer can replace a linear layer, or why not."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from einlinear.nn import Conv1d, Conv2d, Embedding, Linear, MoELinear
from einlinear.nn.dense_layers import is_conv1d
from einlinear.nn.interception import has_any_hooks

# attributes that say nothing about what a subclass of torch.nn.Linear computes
_PLAIN = {"training", "in_features", "out_features", *vars(nn.Module())}
_differences: dict[Any, str | None] = {}


def reason_to_skip(module: Any, classes: tuple[type[nn.Module], ...] = ()) -> str | None:
    """Return why no structure can replace a layer or embedding, or None; `classes` count as linear in any case."""
    if isinstance(module, Linear | MoELinear | Embedding | Conv1d | Conv2d):
        return f"is already structured: {module.structure.spec}"
    if reason := reason_of_state(module, ("weight",)):
        return reason
    if isinstance(module, nn.Embedding):
        return _difference_to_embedding(module)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return _difference_to_convolution(module)
    if type(module) is nn.Linear or is_conv1d(module) or isinstance(module, classes):
        return None
    if difference := difference_to_linear(module):
        name = type(module).__name__
        return f"is a {name}, and no plain nn.Linear: {difference}. classes=[{name}] converts it all the same"
    return None


def reason_of_state(module: Any, weights: Sequence[str]) -> str | None:
    """Return what a module has beside plain weights of these names that a replacement would lose, or None."""
    advice = "which would be lost: make it permanent first, with torch.nn.utils."
    if is_parametrized(module):
        return f"has a parametrization, {advice}parametrize.remove_parametrizations"
    if missing := [name for name in weights if name not in module._parameters]:
        others = ", ".join(module._parameters)
        return f"has a {missing[0]} that is computed from others ({others}), {advice}prune.remove or remove_weight_norm"
    for name in weights:
        weight = module._parameters[name]
        if is_lazy(weight):
            return f"has no {name} yet: call the model once, so that its features are known"
        if type(weight) is not nn.Parameter:
            return f"has a {name} that is a {type(weight).__name__}, as quantised and sharded layers have"
    if has_any_hooks(module):
        return "has hooks, which would be lost"
    return (
        "has a forward of its own beside that of its class, which would be lost" if "forward" in vars(module) else None
    )


def _difference_to_embedding(module: nn.Embedding) -> str | None:
    if type(module) is not nn.Embedding:
        return f"is a {type(module).__name__}, and no plain nn.Embedding"
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return "has max_norm, scale_grad_by_freq or sparse, which structured embeddings do not have"
    return None


def _difference_to_convolution(module: nn.Conv1d | nn.Conv2d) -> str | None:
    if type(module) not in (nn.Conv1d, nn.Conv2d):
        return f"is a {type(module).__name__}, and no plain nn.Conv1d or nn.Conv2d"
    return f"has {module.groups} groups, which structured convolutions do not have" if module.groups != 1 else None


def difference_to_linear(layer: nn.Linear) -> str | None:
    """Return the difference of a subclass's layer to `torch.nn.Linear`, or None if they compute the same on the CPU."""
    others = [name for name in (*layer._parameters, *layer._buffers, *layer._modules) if name not in ("weight", "bias")]
    if others:
        return f"it has {', '.join(others)} beside weight and bias"
    cls = type(layer)
    if cls.forward is nn.Linear.forward and cls.__call__ is nn.Module.__call__:
        return None
    attributes = sorted((name, text) for name, (_, text) in attributes_of(layer).items())
    size = layer.in_features, layer.out_features, layer.bias is not None
    key = cls, cls.forward, cls.__call__, size, tuple(attributes)
    if key not in _differences:
        _differences[key] = _difference(layer)
    return _differences[key]


@torch.no_grad()
def _difference(layer: nn.Linear) -> str | None:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    arguments = list(inspect.signature(type(layer).forward).parameters.values())[1:]
    if len(arguments) != 1 or arguments[0].kind not in positional:
        return "its forward pass takes more than one input"
    training, attributes = layer.training, attributes_of(layer)
    try:
        with torch.random.fork_rng(devices=[]):
            x = torch.randn(2, 3, layer.in_features)
            # of rank one, since drawing all entries takes long in large layers
            tensors = {"weight": torch.randn(layer.out_features, 1) * torch.randn(1, layer.in_features)}
            if layer.bias is not None:
                tensors["bias"] = torch.randn(layer.out_features)
            expected = F.linear(x, **tensors)
            for mode in (True, False):
                layer.training = mode
                y = functional_call(layer, tensors, (x,))
                is_alike = type(y) is Tensor and (y.shape, y.dtype) == (expected.shape, expected.dtype)
                if not is_alike or not torch.allclose(y, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())):
                    return "its forward pass computes something else"
    # a forward pass that was written for other weights may raise anything
    except Exception as error:
        return f"its forward pass could not be compared: {type(error).__name__}: {error}"
    finally:
        layer.training = training
    return None if attributes_of(layer) == attributes else "its forward pass changes the layer"


def attributes_of(layer: nn.Module) -> dict[str, tuple[int, str]]:
    return {name: (id(value), repr(value)) for name, value in vars(layer).items() if name not in _PLAIN}
