"""Merging of adapters into the weights of dense layers, W + scale * S, and its exact inverse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from einlinear.adapters.adapted_linear import AdaptedLinear
from einlinear.conversion.replacement import owners_of
from einlinear.nn import Linear, QuantizedLinear
from einlinear.nn.dense_layers import is_conv1d, is_linear, weight_matrix
from einlinear.nn.names import plain_modules


def merge(model: nn.Module) -> None:
    """Add the active adapters to the weights of their layers, in place: the model is as fast as without adapters.

    The adapters, and a copy of every weight as it was, stay in memory for `unmerge`; `remove` frees them. Sums are
    computed in float32 at least, and rounded once.

    Raises:
        ValueError: a model without active adapters, adapters that are merged already, or a layer whose weight cannot
            hold the sum: structured and quantised ones, which `einlinear.densify` makes dense. The model is then
            unchanged.

    Example:
        >>> import torch, einlinear as el
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(64, 64)), torch.randn(2, 64)
        >>> report = el.adapt(model, "btt")
        >>> before = model[0].base_layer.weight.clone()
        >>> el.adapters.merge(model)
        >>> el.adapters.unmerge(model)
        >>> bool((model[0].base_layer.weight == before).all())
        True
    """
    layers = {name: layer for name, layer in adapted_layers(model).items() if layer.active}
    if not layers:
        raise ValueError("no adapter is active: name those to merge with el.adapters.activate(model, names)")
    check_unmerged(layers, "merge again")
    owners = owners_of(model)
    for name, layer in layers.items():
        if reason := reason_not_to_merge(layer.base_layer):
            raise ValueError(f"{name}: {reason}")
        for other, owner in owners[id(layer.weight)]:
            if owner is not layer.base_layer:
                raise ValueError(f"{name}: an adapter cannot be merged into a weight that is tied to {other}")
    try:
        for name, layer in layers.items():
            merge_layer(layer, name)
    except ValueError:
        for layer in layers.values():
            if layer.merged:
                unmerge_layer(layer)
        raise


def unmerge(model: nn.Module) -> None:
    """Restore the weights as they were before `merge`, bit for bit.

    Raises:
        ValueError: no adapter is merged, or a layer was converted since.
    """
    merged = [layer for layer in adapted_layers(model).values() if layer.merged]
    if not merged:
        raise ValueError("no adapter is merged")
    for layer in merged:
        if isinstance(layer.base_layer, Linear):
            what = f"{layer.base_layer.structure.spec} replaced a layer after adapters were merged into it"
            raise ValueError(f"{what}: its weight has them for good. Remove the adapters, el.adapters.remove(model)")
    for layer in merged:
        unmerge_layer(layer)


def reason_not_to_merge(base_layer: nn.Module) -> str | None:
    """Return why no adapter can be merged into the weight of a layer, or None."""
    if isinstance(base_layer, Linear):
        kind = "quantised" if isinstance(base_layer, QuantizedLinear) else "structured"
        what = f"a {kind} layer ({base_layer.structure.spec})"
        return f"an adapter cannot be merged into {what}: first make it dense, el.densify(model)"
    weight = base_layer._parameters.get("weight")
    if not is_linear(base_layer) or is_parametrized(base_layer) or weight is None:
        return f"an adapter cannot be merged into a {type(base_layer).__name__} whose weight is computed from others"
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        kind = f"{type(weight).__name__} of dtype {weight.dtype}"
        return f"an adapter cannot be merged into a {kind}, as quantised and sharded layers have"
    return "an adapter cannot be merged on the meta device: load the weights first" if weight.is_meta else None


@torch.no_grad()
def merge_layer(layer: AdaptedLinear, name: str = "the layer") -> None:
    """Add the active adapters of a layer to its weight; ValueError if a sum is not finite."""
    base: Any = layer.base_layer
    total = merged_weight(base, [layer.adapters[key].dense_weight() for key in layer.active])  # type: ignore[operator]
    if total is None:
        raise ValueError(f"{name}: the sum of weight and adapters has entries that are not finite")
    layer.unmerged_weight, layer.merged = base.weight.detach().clone(), layer.active
    base.weight.copy_(total)


@torch.no_grad()
def unmerge_layer(layer: AdaptedLinear) -> None:
    """Restore the weight of a layer."""
    assert layer.unmerged_weight is not None
    layer.base_layer.weight.copy_(layer.unmerged_weight)  # type: ignore[operator]
    layer.unmerged_weight, layer.merged = None, ()


@torch.no_grad()
def merged_weight(base_layer: Any, matrices: list[Tensor]) -> Tensor | None:
    """Return the weight of a dense layer plus matrices of shape (out, in), or None if it is not finite."""
    weight = base_layer.weight
    total = weight_matrix(base_layer).to(torch.promote_types(weight.dtype, torch.float32))
    for matrix in matrices:
        total = total + matrix.to(total.device)
    total = total.to(weight.dtype)
    if not torch.isfinite(total).all():
        return None
    return total.T if is_conv1d(base_layer) else total


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Return the layers with adapters by their first qualified name; ValueError if there are none."""
    layers: dict[int, tuple[str, AdaptedLinear]] = {}
    for name, module in plain_modules(model):
        if isinstance(module, AdaptedLinear):
            layers.setdefault(id(module), (name, module))
    if not layers:
        raise ValueError("the model has no adapters: el.adapt adds them, el.adapters.load reads them from a file")
    return dict(layers.values())


def check_unmerged(layers: Mapping[str, AdaptedLinear], action: str) -> None:
    """Raise ValueError if adapters are merged."""
    if merged := {name: None for layer in layers.values() for name in layer.merged}:
        wrong = f"adapters are merged ({', '.join(merged)})"
        raise ValueError(f"{wrong}: to {action}, call el.adapters.unmerge(model) first")
