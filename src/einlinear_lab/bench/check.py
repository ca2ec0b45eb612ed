"""The check of every variant's output against the dense matrix in float64, without which no speed is reported.

The tolerance is four times the error of the dense matmul in the same dtype on the same data. For gradients of factors
it grows with the square root of the number of terms in their sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from einlinear import ops
from einlinear_lab.bench.variants import DENSE, Variant, Workload

SLACK = 4.0
NAMES = ("output", "gradient of the input", "gradient of the weight", "gradient of the bias")


class Reference:
    """The exact output and gradients of a workload in float64, and the errors of a dense layer with the same matrix."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        x, bias, factors = _double([workload.x]), _double(workload.biases), _double(workload.layer.factors())
        weight = ops.dense_weight(workload.structure, factors)
        y = sum(bias, x[0] @ weight.T)
        # gradients of the input, of the weight, of the bias
        gradients = []
        self._of_factors: list[Tensor] = []
        if workload.case.mode == "train":
            grads = torch.autograd.grad(y, [*x, weight, *bias, *factors], workload.grad.double())
            gradients, self._of_factors = [*grads[: -len(factors)]], [*grads[-len(factors) :]]
        self._of_dense = [y.detach(), *gradients]
        outputs = workload.step(Variant(DENSE, [workload.dense.weight], workload.dense))
        self._errors = [_error(output, exact) for output, exact in zip(outputs, self._of_dense, strict=True)]

    def complaint(self, variant: Variant) -> str | None:
        """Return the error of a variant beyond its tolerance in words, or None."""
        factors = self._workload.structure.factors
        terms = math.sqrt(max(factor.macs / factor.params for factor in factors))
        expected = list(zip(NAMES, self._of_dense, self._errors, (SLACK,) * 4))
        if self._of_factors:
            error = self._errors[2]
            expected[2:3] = [
                (f"gradient of weight {i}", exact, error, SLACK * terms)
                for i, exact in enumerate(variant.stored(self._of_factors), 1)
            ]
        eps = torch.finfo(self._workload.x.dtype).eps
        for (name, exact, dense, slack), output in zip(expected, self._workload.step(variant), strict=True):
            for off, limit in zip(_error(output, exact), dense, strict=True):
                allowed = slack * max(limit, eps)
                # also true for NaN
                if not off <= allowed:
                    return f"the {name} is off by {off:.1e} of its size, where {allowed:.1e} is allowed"
        return None


def _double(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_(torch.is_grad_enabled()) for tensor in tensors]


def _error(output: Tensor, exact: Tensor) -> tuple[float, float]:
    """Return the error relative to the root mean square of the exact values: of all entries, and of the worst."""
    if output.shape != exact.shape:
        return math.inf, math.inf
    error = output.detach().double() - exact
    size = exact.square().mean().sqrt()
    return float(error.square().mean().sqrt() / size), float(error.abs().max() / size)
