"""Which adapters of a model are computed and trained: activate, disable, remove."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from einlinear.adapters.adapted_linear import AdaptedLinear
from einlinear.adapters.merging import adapted_layers, check_unmerged, merge_layer, unmerge_layer
from einlinear.conversion.replacement import replace_modules


def activate(model: nn.Module, names: str | Sequence[str]) -> None:
    """Compute one adapter, or the sum of several, and no others. Active adapters require gradients, others do not.

    Raises:
        ValueError: a model without adapters, a name that none of them has, or adapters that are merged.

    Example:
        >>> import torch, einlinear as el
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> for name in ("english", "german"):
        ...     report = el.adapt(model, "low_rank(rank=4)", name=name)
        >>> el.adapters.activate(model, ["english", "german"])
        >>> model[0].active
        ('english', 'german')
    """
    layers = adapted_layers(model)
    chosen = _check_names(layers, names)
    check_unmerged(layers, "activate")
    for layer in layers.values():
        layer.active = tuple(name for name in chosen if name in layer.adapters)
        for name, adapter in layer.adapters.items():
            adapter.requires_grad_(name in chosen)


@contextmanager
def disable(model: nn.Module) -> Iterator[None]:
    """Compute the model without its adapters in this context, also if they are merged.

    Example:
        >>> import torch, einlinear as el
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(64, 64)), torch.randn(2, 64)
        >>> before, report = model(x), el.adapt(model, "btt")
        >>> torch.nn.init.ones_(model[0].adapters["default"].B).shape
        torch.Size([8, 8, 8, 1])
        >>> with el.adapters.disable(model):
        ...     bool((model(x) == before).all())
        True
    """
    before = [(layer, layer.active, layer.merged) for layer in adapted_layers(model).values()]
    try:
        for layer, _, merged in before:
            if merged:
                unmerge_layer(layer)
            layer.active = ()
        yield
    finally:
        for layer, active, merged in before:
            layer.active = active
            if merged and not layer.merged:
                merge_layer(layer)


def remove(model: nn.Module, names: str | Sequence[str] | None = None) -> None:
    """Remove adapters by name, or all, which puts the base layers back in their places, with what is merged into them.

    Parameters stay frozen: `model.requires_grad_(True)` undoes that.

    Raises:
        ValueError: a model without adapters, a name that none of them has, or some of several that are merged.
    """
    layers = adapted_layers(model)
    chosen = _check_names(layers, names) if names is not None else [*_names(layers)]
    if set(chosen) != set(_names(layers)):
        check_unmerged(layers, "remove some of them")
    for layer in layers.values():
        layer.active = tuple(name for name in layer.active if name not in chosen)
        for name in {*chosen} & {*layer.adapters}:
            del layer.adapters[name]
    replace_modules(model, {id(layer): layer.base_layer for layer in layers.values() if not layer.adapters})


def _names(layers: dict[str, AdaptedLinear]) -> dict[str, None]:
    return dict.fromkeys(name for layer in layers.values() for name in layer.adapters)


def _check_names(layers: dict[str, AdaptedLinear], names: str | Sequence[str]) -> list[str]:
    chosen = [names] if isinstance(names, str) else names
    if not isinstance(chosen, list | tuple):
        raise TypeError(f"names must be the name of an adapter, or a list of names, not {names!r}")
    for name in chosen:
        if name not in _names(layers):
            raise ValueError(f"the model has no adapter named {name!r}, but {', '.join(_names(layers))}")
    return list(chosen)
