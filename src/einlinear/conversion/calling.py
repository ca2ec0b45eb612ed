"""Calling a model with a batch of its inputs, whatever these are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Batch = Any  # what a model is called with: a tensor, a sequence of positional arguments, a mapping of named ones


def call(model: nn.Module, batch: Batch) -> Any:
    """Return the model's output for a batch, which is moved to the model's device."""
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        return model(**{name: _to(value, device) for name, value in batch.items()})
    if isinstance(batch, list | tuple):
        return model(*[_to(value, device) for value in batch])
    return model(_to(batch, device))


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
