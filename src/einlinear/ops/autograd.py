"""What the autograd functions of this library have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function


def direct_apply(function: type[Function]) -> Callable[..., Any]:
    """Return `function.apply` without its search for transforms, for calls of which it is known that there are none."""
    of_function: Any = super(Function, function)
    return of_function.apply  # type: ignore[no-any-return]


def plain_gradients(
    compute: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grad: Tensor | Sequence[Tensor],
) -> list[Tensor | None]:
    """Return the gradients of plain operators, for a backward pass that is itself differentiated or batched."""
    with torch.enable_grad():
        # by other names, since one input may have been computed from another: each gets its own share alone
        inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        y = compute(*inputs)
    wanted = [tensor for tensor, needs in zip(inputs, needed, strict=True) if needs and tensor is not None]
    gradients = iter(torch.autograd.grad(y, wanted, grad, create_graph=torch.is_grad_enabled()))
    return [next(gradients) if needs else None for needs in needed]
