"""Calls of a model with a batch, whatever arguments its forward pass takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# a tensor, a sequence of positional arguments, or a mapping of named arguments
Batch = Any


def call(model: nn.Module, batch: Batch) -> Any:
    """Return the model's output for a batch, which is moved to the model's device.

    Raises:
        TypeError: the batch has arguments that the model's forward pass does not take, such as labels.
    """
    device = next(model.parameters()).device
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        kwargs = {name: _to(value, device) for name, value in batch.items()}
    else:
        args = tuple(_to(value, device) for value in (batch if isinstance(batch, list | tuple) else (batch,)))
    try:
        return model(*args, **kwargs)
    except TypeError as error:
        if (mistake := _mistake(model, args, kwargs)) is None:
            raise
        raise TypeError(
            f"the model cannot be called with this batch: {mistake}. A sequence holds positional arguments and a "
            "mapping named ones: leave out labels, as in [x for x, _ in loader]"
        ) from error


def _mistake(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Return the error in the number or the names of the arguments, or None."""
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return None


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Set models to evaluation mode, and every module back to its own mode afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
