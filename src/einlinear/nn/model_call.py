"""Calls of a model with a batch, whatever arguments its forward pass takes."""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

# a tensor, a sequence of positional arguments, or a mapping of named arguments
Batch = Any


def call(model: nn.Module, batch: Batch) -> Any:
    """Return the model's output for a batch, moved to its device; TypeError for arguments that it does not take."""
    args, kwargs = batch if isinstance(batch, list | tuple) else (batch,), {}
    if isinstance(batch, Mapping):
        args, kwargs = (), dict(batch)
    device = next(model.parameters()).device
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(device), (args, kwargs))
    try:
        return model(*args, **kwargs)
    except TypeError as error:
        try:
            inspect.signature(model.forward).bind(*args, **kwargs)
        except TypeError as mistake:
            hint = "A sequence is positional arguments: leave out labels, as in [x for x, _ in loader]"
            raise TypeError(f"the model cannot be called with this batch: {mistake}. {hint}") from error
        raise


def check_batches(batches: object, argument: str) -> None:
    """Raise TypeError for what is no iterable of batches, or for a single batch."""
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        kind = type(batches).__name__
        raise TypeError(f"{argument} must be an iterable of batches, not a {kind}: for a single batch give [batch]")


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


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let parameters need no gradients; those that did need them again afterwards."""
    learning = [p.requires_grad_(False) for p in parameters if p.requires_grad]
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_()


@contextmanager
def preserved_rng_state() -> Iterator[None]:
    """Restore the states of the global generators at the end: new layers draw weights, even if others replace them."""
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
        yield


@contextmanager
def without_key_cache(model: nn.Module) -> Iterator[None]:
    """Let a model of transformers drop the keys and values of its layers, which no further token will read."""
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    caching: list[Any] = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


def uncompiled() -> AbstractContextManager[object]:
    """Return a context in which compiled models run as they were written."""
    # importing the compiler takes long: without it nothing is compiled
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def patched(module: nn.Module, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Replace a method of one module; other libraries do so as well, and their method is restored."""
    before = vars(module).get(name)
    setattr(module, name, method)
    try:
        yield
    finally:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)
