"""`shared_input_linear`, several layers of one input, such as queries, keys and values of attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from einlinear import structures
from einlinear.ops.autograd import direct_apply
from einlinear.ops.context import is_unobserved, wants_gradients
from einlinear.ops.fused_dispatch import reason_not_to_stack
from einlinear.ops.linear_function import linear
from einlinear.ops.operands import Extent, Weights, are_contiguous_cpu, extents, weight_shapes
from einlinear.structures import Structure


def shared_input_linear(x: Tensor, layers: Sequence[Weights]) -> tuple[Tensor, ...]:
    """Multiply an input with several structured matrices, such as those of queries, keys and values.

    On the CPU, layers of equal structures run as one product, of factors that are stacked for the call, where
    `ops.reason_not_to_stack` gives no reason against it. All others run one after the other, with `linear`, as do all
    layers under autocast, torch.compile, torch.func, torch.fx, export, and for tensor subclasses.

    Args:
        x: (..., in_features), as for `linear`.
        layers: the weights of every layer.

    Returns:
        The output of every layer, (..., out_features). Those of one product lie in memory side by side.

    Raises:
        TypeError: a layer that is not `Weights`.
        RuntimeError, ValueError, TypeError: tensors that do not fit, as for `linear`.

    Example:
        >>> import torch, einlinear as el
        >>> query, key = el.structure("btt", 64, 64), el.structure("btt", 64, 16)
        >>> layers = [el.ops.Weights(s, [torch.randn(shape) for shape in s.shapes]) for s in (query, key, key)]
        >>> [tuple(y.shape) for y in el.ops.shared_input_linear(torch.randn(100, 64), layers)]
        [(100, 64), (100, 16), (100, 16)]
    """
    for weights in layers:
        if not isinstance(weights, Weights):
            raise TypeError(f"a layer must be Weights(structure, factors, bias), not {type(weights).__name__}")
    outputs: list[Tensor | None] = [None] * len(layers)
    if type(x) is Tensor and x.is_cpu and not x.is_nested and x.dim() and is_unobserved():
        for indices in _groups(x, layers):
            for index, y in zip(indices, _stacked(x, [layers[index] for index in indices])):
                outputs[index] = y
    pairs = zip(outputs, layers)
    return tuple([linear(w.structure, w.factors, x, w.bias) if y is None else y for y, w in pairs])


def _groups(x: Tensor, layers: Sequence[Weights]) -> list[list[int]]:
    """Return the indices of layers that run as one product."""
    alike: dict[tuple[Structure, bool], list[int]] = {}
    for index, (structure, _, bias) in enumerate(layers):
        alike.setdefault((structure, bias is not None), []).append(index)
    groups, width = [], x.shape[-1]
    for (structure, has_bias), indices in alike.items():
        if len(indices) == 1 or structure.in_features != width:
            continue
        tensors: list[Any] = []
        for _, factors, bias in [layers[index] for index in indices]:
            tensors += factors if bias is None else (*factors, bias)
        tokens, training = x.numel() // width, wants_gradients(x, *tensors)
        if reason_not_to_stack(structure, len(indices), tokens, x.dtype, x.device, training) is not None:
            continue
        # others are left to `linear`, which knows what is wrong with them
        expected = _extents(structure, has_bias, x.itemsize) * len(indices)
        is_usual = len(tensors) == len(expected) and are_contiguous_cpu(tensors, expected, x.dtype)
        if is_usual and not (training and _are_partly_frozen(tensors, len(indices))):
            groups.append(indices)
    return groups


def _are_partly_frozen(tensors: Sequence[Tensor], layers: int) -> bool:
    """Return whether some layers need gradients that others do not need: stacked factors have them together."""
    needed = [tensor.requires_grad for tensor in tensors]
    return needed != needed[: len(needed) // layers] * layers


@lru_cache(maxsize=4096)
def _extents(structure: Structure, has_bias: bool, itemsize: int) -> tuple[Extent, ...]:
    """Return the extents of the factors and the bias of a layer."""
    return extents(weight_shapes(structure, has_bias), itemsize)


def _stacked(x: Tensor, layers: Sequence[Weights]) -> Sequence[Tensor]:
    """Return the outputs of layers of equal structures, computed as one product."""
    first, *_ = layers
    factors = [torch.stack(same) for same in zip(*[layer.factors for layer in layers])]
    bias = None if first.bias is None else torch.cat([layer.bias for layer in layers])  # type: ignore[misc]
    y = linear(structures.stack(first.structure, len(layers)), factors, x, bias)
    if wants_gradients(y):
        return _apply_split(y, len(layers))  # type: ignore[no-any-return]
    return _split(y, len(layers))


def _split(y: Tensor, layers: int) -> tuple[Tensor, ...]:
    # data: not views of one tensor, which autograd would not let a model change in place
    return tuple([part.data for part in y.chunk(layers, -1)])


class _Split(torch.autograd.Function):
    """`_split` with gradients."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, layers: int) -> tuple[Tensor, ...]:
        return _split(y, layers)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.cat(grads, -1), None


_apply_split = direct_apply(_Split)
