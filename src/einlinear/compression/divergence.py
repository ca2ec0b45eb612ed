"""The divergence between the answers of two models, computed for a few tokens at a time: vocabularies are large.

The logits of a batch can take more memory than all the rest of a forward pass. Where a linear layer puts them out, its
inputs are kept instead, and the logits are computed again, slice by slice (`running.Readout`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ENTRIES = 2**18  # of the logits of a slice: 1 MB in float32
_PARTS = 32  # of a batch, at most: a layer that puts out logits reads its weight for each


def slices(tokens: int, features: int, parts: int = _PARTS) -> Iterator[slice]:
    """The tokens in parts, few enough that the outputs of each part are small.

    >>> [(part.start, part.stop) for part in slices(5, 2**17)]
    [(0, 2), (2, 4), (4, 5)]
    """
    step = max(1, _ENTRIES // features, tokens // parts)
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def divergence(right: Tensor, found: Tensor) -> float:
    """The divergence of the answers that logits stand for, both (tokens, classes), in nats, summed over the tokens."""
    total = 0.0
    for part in slices(len(right), right.shape[1], len(right)):
        answers, others = right[part].float().log_softmax(1), found[part].float().log_softmax(1)
        total += float(F.kl_div(others, answers, log_target=True, reduction="sum"))
    return total


def mean_divergence(found: Tensor, right: Callable[[slice], Tensor], in_place: bool = False) -> Tensor:
    """The same on average over the tokens, differentiable in what was found.

    Args:
        found: logits, (tokens, classes).
        right: gives the logits of the original for some of the tokens.
        in_place: the gradient is written over the logits, which nobody else may need then.
    """
    loss: Tensor = _MeanDivergence.apply(found, right, in_place)  # type: ignore[no-untyped-call]
    return loss


class _MeanDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, found: Tensor, right: Callable[[slice], Tensor], in_place: bool) -> Tensor:
        logits = found.detach()
        gradient = logits if in_place else torch.empty_like(logits)
        total = torch.zeros((), device=found.device)
        for part in slices(len(logits), logits.shape[1]):
            wanted = right(part)
            for inner in slices(len(wanted), wanted.shape[1], len(wanted)):
                answers, others = wanted[inner].float().log_softmax(1), logits[part][inner].float().log_softmax(1)
                total += F.kl_div(others, answers, log_target=True, reduction="sum")
                gradient[part][inner] = others.exp_().sub_(answers.exp_()).div_(len(logits))
        ctx.gradient = gradient
        return total / max(len(logits), 1)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[Tensor, None, None]:
        gradient: Tensor = ctx.gradient
        del ctx.gradient
        return gradient.mul_(outer[0].to(gradient.dtype)), None, None
