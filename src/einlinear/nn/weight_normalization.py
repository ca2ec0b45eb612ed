"""Weight normalisation of factors: gamma * M / max(1, RMS(M) / sigma) (Qiu et al., arXiv 2406.06248, section 5.1).

On the CPU one autograd function normalises all factors of a layer, in half the time of torch's operators and their
derivatives, or less. Its scales are Python numbers, for which a GPU would have to be waited for. Whatever traces,
transforms or differentiates again sees the operators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from einlinear.ops.autograd import direct_apply, plain_gradients
from einlinear.ops.context import CallContext, call_context, is_differentiated_again, wants_gradients

_EPSILON = 1e-8


class Matrix(NamedTuple):
    """What normalises a factor: sigma, the sizes of the matrix, and how many axes of a stack are before these.

    The sizes are not asked of the tensor, whose dimensions torch.fx does not know.
    """

    std: float
    sizes: tuple[int, ...]
    stacked: int = 0

    @property
    def variance(self) -> float:
        """The sum of squares of a matrix with an RMS of sigma."""
        return math.prod(self.sizes) * self.std**2


def normalize(matrices: Sequence[Matrix], factors: Sequence[Tensor], gammas: Sequence[Tensor]) -> list[Tensor]:
    """Return the normalised factors, differentiable any number of times; without gammas, these are one.

    A gamma has shape (1,), or (n,) for a stack of n matrices, each of which is normalised alone.
    """
    tensors = (*factors, *gammas)
    has_numbers = call_context(*tensors) is CallContext.EAGER and all(tensor.is_cpu for tensor in tensors)
    if not has_numbers or any(matrix.stacked for matrix in matrices):
        return _plain(matrices, factors, gammas)
    if wants_gradients(*tensors):
        return [*_apply_normalize(matrices, *tensors)]
    return [factor * scale.total for factor, scale in zip(factors, _scales(matrices, tensors))]


def _plain(matrices: Sequence[Matrix], factors: Sequence[Tensor], gammas: Sequence[Tensor]) -> list[Tensor]:
    normalized = []
    for i, (matrix, factor) in enumerate(zip(matrices, factors, strict=True)):
        dims = tuple(range(matrix.stacked, matrix.stacked + len(matrix.sizes)))
        rms = factor.square().mean(dims, keepdim=True).add(_EPSILON).sqrt()
        normalized.append(factor / (rms / matrix.std).clamp(min=1))
        if gammas:
            normalized[i] = gammas[i].view(-1, *[1] * dims[-1]) * normalized[i]
    return normalized


def _of_tensors(matrices: Sequence[Matrix], *tensors: Tensor) -> list[Tensor]:
    return _plain(matrices, tensors[: len(matrices)], tensors[len(matrices) :])


class _Scale(NamedTuple):
    # gamma / max(1, RMS / sigma), and the same without gamma
    total: float
    inverse: float
    # whether RMS / sigma is 1 or more
    is_large: bool


def _scales(matrices: Sequence[Matrix], tensors: Sequence[Tensor]) -> list[_Scale]:
    scales, count = [], len(matrices)
    for i, (matrix, factor) in enumerate(zip(matrices, tensors)):
        norm = torch.linalg.vector_norm(factor, dtype=_accumulated(factor)).item()
        # (RMS / sigma)^2
        ratio = norm**2 / matrix.variance + _EPSILON / matrix.std**2
        # not a number where a weight is not
        inverse = 1.0 if ratio < 1 else ratio**-0.5
        gamma = tensors[count + i].item() if len(tensors) > count else 1.0
        scales.append(_Scale(gamma * inverse, inverse, not ratio < 1))
    return scales


def _accumulated(tensor: Tensor) -> torch.dtype | None:
    """Return the dtype of a sum, if it is another one than that of the tensor."""
    return torch.float32 if tensor.itemsize < 4 else None


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrices: Sequence[Matrix], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.matrices, ctx.scales = matrices, _scales(matrices, tensors)
        ctx.save_for_backward(*tensors)
        return tuple([factor * scale.total for factor, scale in zip(tensors, ctx.scales)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        matrices, tensors, needed = ctx.matrices, ctx.saved_tensors, ctx.needs_input_grad[1:]
        if is_differentiated_again(*grads):
            return None, *plain_gradients(partial(_of_tensors, matrices), tensors, needed, grads)
        count, gradients = len(matrices), list[Tensor | None]([None] * len(needed))
        for i, (matrix, scale, factor, grad) in enumerate(zip(matrices, ctx.scales, tensors, grads)):
            # not torch.dot, which divides even small factors among threads
            of_scale = (grad * factor).sum(dtype=_accumulated(factor)).item()
            if needed[i]:
                gradient = grad * scale.total
                if scale.is_large:
                    # the derivative of inverse by M is -M * inverse^3 / variance
                    gradient.add_(factor, alpha=-of_scale * scale.total * scale.inverse**2 / matrix.variance)
                gradients[i] = gradient
            if len(needed) > count and needed[count + i]:
                gradients[count + i] = factor.new_full((1,), of_scale * scale.inverse)
        return None, *gradients


_apply_normalize = direct_apply(_Normalize)
