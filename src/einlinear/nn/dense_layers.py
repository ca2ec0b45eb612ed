"""Dense linear layers, `torch.nn.Linear` and transformers' Conv1D: their features, and their weights as matrices."""

import math
from typing import Any

import torch
from torch import Tensor, nn


def is_linear(module: Any) -> bool:
    """Return whether a module is a dense linear layer: `torch.nn.Linear` or a subclass, or transformers' Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: Any) -> bool:
    """Return whether a module is transformers' Conv1D, with a weight of shape (in_features, out_features)."""
    return is_of_transformers(module, "Conv1D")


def features(linear: Any) -> tuple[int, int]:
    """Return (in_features, out_features) of a linear layer, dense or structured, a convolution, or an embedding."""
    if isinstance(linear, nn.Embedding):
        return int(linear.embedding_dim), int(linear.num_embeddings)
    if isinstance(linear, nn.Conv1d | nn.Conv2d):
        return linear.in_channels // linear.groups * math.prod(linear.kernel_size), linear.out_channels
    if is_conv1d(linear):
        return int(getattr(linear, "nx", linear.weight.shape[0])), int(linear.nf)
    return int(linear.in_features), int(linear.out_features)


def weight_matrix(linear: Any) -> Tensor:
    """Return the weight of a dense linear layer as (out_features, in_features); a view for Conv1D. Else TypeError."""
    if not is_linear(linear):
        kind = type(linear).__name__
        raise TypeError(f"expected an nn.Linear, a Conv1D or a weight of shape (out, in), not {kind}")
    weight: Tensor = linear.weight
    return weight.T.requires_grad_(weight.requires_grad) if is_conv1d(linear) else weight


def as_class(linear: Any, dense_class: type[nn.Module]) -> nn.Module:
    """Return a `torch.nn.Linear` as a Conv1D, or as a subclass without a constructor of its own; others as they are."""
    if not isinstance(linear, nn.Linear):
        return linear  # type: ignore[no-any-return]
    if issubclass(dense_class, nn.Linear):
        if dense_class.__init__ is nn.Linear.__init__:
            linear.__class__ = dense_class
        return linear
    with torch.device("meta"):
        conv1d: Any = dense_class(linear.out_features, linear.in_features)
    conv1d.weight = nn.Parameter(linear.weight.detach().T.contiguous(), linear.weight.requires_grad)
    conv1d.bias = linear.bias
    return conv1d.train(linear.training)  # type: ignore[no-any-return]


def is_of_transformers(module: Any, *names: str) -> bool:
    """Return whether a module is of a class of transformers with one of these names."""
    return type(module).__name__ in names and type(module).__module__.startswith("transformers.")
