"""No speed without a right result: every variant against the dense matrix in float64.

How far off a variant may be follows from the error that the dense matmul itself makes in the same dtype on the same
data: four times that, and for gradients of factors in proportion to the root of how many more terms they sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from einlinear import ops
from einlinear_lab.bench.variants import DENSE, Problem, Variant

SLACK = 4.0
NAMES = ("output", "gradient of the input", "gradient of the weight", "gradient of the bias")


@dataclass(frozen=True)
class _Error:
    """How far off a tensor is, relative to its right values (root mean square): in the mean, and at the worst entry."""

    mean: float
    largest: float


class Reference:
    """What a problem's results are in float64, and how far off those of a dense layer with the same matrix are."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        x, bias, factors = _double([problem.x]), _double(problem.biases), _double(problem.layer.factors())
        weight = ops.dense_weight(problem.structure, factors)
        y = sum(bias, x[0] @ weight.T)
        own = []  # gradients of the input, of the weight, of the bias
        self._of_factors: list[Tensor] = []
        if problem.case.mode == "train":
            grads = torch.autograd.grad(y, [*x, weight, *bias, *factors], problem.grad.double())
            own, self._of_factors = [*grads[: -len(factors)]], [*grads[-len(factors) :]]
        self._of_dense = [y.detach(), *own]
        found = problem.step(Variant(DENSE, [problem.dense.weight], problem.dense))
        self._errors = [_error(f, w) for f, w in zip(found, self._of_dense, strict=True)]

    def complaint(self, variant: Variant) -> str | None:
        """What is wrong with a variant's results, or None if they are right."""
        factors = self._problem.structure.factors
        terms = math.sqrt(max(factor.macs / factor.params for factor in factors))
        expected = list(zip(NAMES, self._of_dense, self._errors, (SLACK,) * 4))
        if self._of_factors:
            error = self._errors[2]
            expected[2:3] = [
                (f"gradient of weight {i}", wanted, error, SLACK * terms)
                for i, wanted in enumerate(variant.stored(self._of_factors), 1)
            ]
        eps = torch.finfo(self._problem.x.dtype).eps
        for (name, wanted, dense, slack), found in zip(expected, self._problem.step(variant), strict=True):
            error = _error(found, wanted)
            for off, limit in ((error.mean, dense.mean), (error.largest, dense.largest)):
                allowed = slack * max(limit, eps)
                if not off <= allowed:  # or it is NaN
                    return f"the {name} is off by {off:.1e} of its size, where {allowed:.1e} is allowed"
        return None


def _double(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_(torch.is_grad_enabled()) for tensor in tensors]


def _error(found: Tensor, wanted: Tensor) -> _Error:
    if found.shape != wanted.shape:
        return _Error(math.inf, math.inf)
    off = found.detach().double() - wanted
    size = wanted.square().mean().sqrt()
    return _Error(float(off.square().mean().sqrt() / size), float(off.abs().max() / size))
