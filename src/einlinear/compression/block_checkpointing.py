"""Gradient checkpointing of a model's blocks: the backward pass holds the activations of one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from einlinear.nn.model_call import patched


@contextmanager
def checkpointed_blocks(model: nn.Module) -> Iterator[None]:
    """Keep of each block its inputs alone for the backward pass, in calls of a model that build a graph."""
    with ExitStack() as after:
        for block in _blocks(model):
            after.enter_context(patched(block, "forward", partial(_run, block.forward)))
        yield


def _run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Iterate over the members of the outermost lists of modules."""
    for child in model.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield from child
        else:
            yield from _blocks(child)
