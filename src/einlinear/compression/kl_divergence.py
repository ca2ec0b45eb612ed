"""Kullback-Leibler divergence between the predictions of two models, a few tokens at a time: vocabularies are large.

The logits of a batch can take more memory than the rest of a forward pass. Where a linear layer computes them, its
inputs are kept instead, and the logits are computed again slice by slice (`tracing.ModelOutput`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# of the logits of a slice: 1 MB in float32
_ENTRIES = 2**18
# of a batch, at most: a head reads its weight once for each slice
_SLICES = 32


def slices(tokens: int, features: int, most: int = _SLICES) -> Iterator[slice]:
    """Split tokens into slices, so few in each that its outputs are small.

    >>> [(part.start, part.stop) for part in slices(5, 2**17)]
    [(0, 2), (2, 4), (4, 5)]
    """
    step = max(1, _ENTRIES // features, tokens // most)
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def summed_kl_divergence(target: Tensor, logits: Tensor) -> float:
    """Return KL(target || logits) in nats, summed over the tokens; both are logits of shape (tokens, classes)."""
    total = 0.0
    for part in slices(len(target), target.shape[1], len(target)):
        p, q = target[part].float().log_softmax(1), logits[part].float().log_softmax(1)
        total += float(F.kl_div(q, p, log_target=True, reduction="sum"))
    return total


def mean_kl_divergence(logits: Tensor, target: Callable[[slice], Tensor], in_place: bool = False) -> Tensor:
    """Return the mean divergence over the tokens, differentiable in the logits.

    Args:
        logits: (tokens, classes).
        target: returns the logits of the original for a slice of the tokens.
        in_place: the gradient overwrites the logits, which must have no other use then.
    """
    loss: Tensor = _MeanDivergence.apply(logits, target, in_place)  # type: ignore[no-untyped-call]
    return loss


class _MeanDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Callable[[slice], Tensor], in_place: bool) -> Tensor:
        logits = logits.detach()
        gradient = logits if in_place else torch.empty_like(logits)
        total = torch.zeros((), device=logits.device)
        for outer in slices(len(logits), logits.shape[1]):
            right = target(outer)
            for part in slices(len(right), right.shape[1], len(right)):
                p, q = right[part].float().log_softmax(1), logits[outer][part].float().log_softmax(1)
                total += F.kl_div(q, p, log_target=True, reduction="sum")
                gradient[outer][part] = q.exp_().sub_(p.exp_()).div_(len(logits))
        ctx.gradient = gradient
        return total / max(len(logits), 1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        gradient: Tensor = ctx.gradient
        del ctx.gradient
        return gradient.mul_(grads[0].to(gradient.dtype)), None, None
