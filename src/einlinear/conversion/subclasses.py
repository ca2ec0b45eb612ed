"""Whether a subclass of `torch.nn.Linear` is one in all but name: then a structured layer can take its place."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

_TOKENS = 3
_PLAIN = {"training", "in_features", "out_features", *vars(nn.Module())}
_found: dict[Any, str | None] = {}


def difference_to_linear(layer: nn.Linear) -> str | None:
    """Return what a layer of a subclass has or does that `torch.nn.Linear` does not; None if that is nothing.

    Its forward pass is compared with `torch.nn.functional.linear` on random inputs, in training and in evaluation. It
    is given weights of its shape on the CPU, so layers on the meta device are compared as well. Layers of one class
    that have the same attributes are compared once.

    Example:
        >>> import torch
        >>> class Doubled(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return 2 * super().forward(x)
        >>> difference_to_linear(Doubled(4, 4))
        'its forward pass computes something else'
    """
    others = [name for name in (*layer._parameters, *layer._buffers, *layer._modules) if name not in ("weight", "bias")]
    if others:
        return f"it has {', '.join(others)} beside weight and bias"
    cls = type(layer)
    if cls.forward is nn.Linear.forward and cls.__call__ is nn.Module.__call__:
        return None
    attributes = sorted((name, repr(value)) for name, value in vars(layer).items() if name not in _PLAIN)
    size = layer.in_features, layer.out_features, layer.bias is not None
    key = cls, cls.forward, cls.__call__, size, tuple(attributes)
    if key not in _found:
        _found[key] = _difference(layer)
    return _found[key]


@torch.no_grad()
def _difference(layer: nn.Linear) -> str | None:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = list(inspect.signature(type(layer).forward).parameters.values())[1:]
    if len(taken) != 1 or taken[0].kind not in positional:
        return "its forward pass takes more than one input"
    training = layer.training
    before = _state(layer)
    try:
        with torch.random.fork_rng(devices=[]):
            x = torch.randn(2, _TOKENS, layer.in_features)
            # of rank one, since drawing all entries takes long in large layers
            weight = torch.randn(layer.out_features, 1) * torch.randn(1, layer.in_features)
            tensors = {"weight": weight}
            if layer.bias is not None:
                tensors["bias"] = torch.randn(layer.out_features)
            expected = F.linear(x, **tensors)
            for mode in (True, False):
                layer.training = mode
                y = functional_call(layer, tensors, (x,))
                if not _agree(y, expected):
                    return "its forward pass computes something else"
    except Exception as error:  # whatever a forward pass raises that was written for other weights
        return f"its forward pass could not be compared: {type(error).__name__}: {error}"
    finally:
        layer.training = training
    return None if _state(layer) == before else "its forward pass changes the layer"


def _agree(y: Any, expected: Tensor) -> bool:
    if type(y) is not Tensor or (y.shape, y.dtype) != (expected.shape, expected.dtype):
        return False
    return torch.allclose(y, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def _state(layer: nn.Module) -> dict[str, tuple[int, str]]:
    return {name: (id(value), repr(value)) for name, value in vars(layer).items() if name not in _PLAIN}
