"""KL divergence of logits, slice by slice: in float32, all logits at once would take much memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# 1 MB of logits in float32
_SLICE_ENTRIES = 2**18


def mean_kl_divergence(logits: Tensor, target: Callable[[slice], Tensor], in_place: bool = False) -> Tensor:
    """Return the mean divergence from a target's slices; `in_place`, the gradient overwrites the unshared logits."""
    loss: Tensor = _MeanDivergence.apply(logits, target, in_place)  # type: ignore[no-untyped-call]
    return loss


class _MeanDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Callable[[slice], Tensor], in_place: bool) -> Tensor:
        logits = logits.detach()
        ctx.gradient = logits if in_place else torch.empty_like(logits)
        total = torch.zeros((), device=logits.device)
        for part in slices(len(logits), logits.shape[1]):
            total += summed_kl_divergence(target(part), logits[part], ctx.gradient[part], len(logits))
        return total / max(len(logits), 1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        gradient: Tensor = ctx.gradient
        del ctx.gradient
        return gradient.mul_(grads[0].to(gradient.dtype)), None, None


def summed_kl_divergence(target: Tensor, logits: Tensor, gradient: Tensor | None = None, tokens: int = 1) -> Tensor:
    """Return KL(target || logits) in nats for logits of shape (tokens, classes), summed over the tokens.

    The gradient of the mean over `tokens` is written to `gradient`, which may be the logits.
    """
    total = torch.zeros((), device=logits.device)
    for part in slices(len(target), target.shape[1], len(target)):
        p, q = target[part].float().log_softmax(1), logits[part].float().log_softmax(1)
        total += F.kl_div(q, p, log_target=True, reduction="sum")
        if gradient is not None:
            gradient[part] = q.exp_().sub_(p.exp_()).div_(tokens)
    return total


def slices(tokens: int, features: int, most: int = 32) -> Iterator[slice]:
    """Split tokens into slices with small outputs, but into few, since a head reads its weight for each one."""
    step = max(1, _SLICE_ENTRIES // features, tokens // most)
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))
