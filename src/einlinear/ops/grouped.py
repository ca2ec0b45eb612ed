"""Products with one of several matrices of the same structure, chosen for every token: the experts of a mixture.

The pairs of a token and one of its experts are sorted by expert, and every expert multiplies its own pairs and nothing
else. A gate scales the input of a pair, not its output: then the gradient of the gate is a product of two vectors that
backward has at hand, and nothing but the input needs to be saved.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from einlinear.ops import dispatch, executors
from einlinear.ops.tiles import executor as tiles
from einlinear.structures import Structure


def grouped_linear(
    structure: Structure, factors: Sequence[Tensor], x: Tensor, experts: Tensor, gates: Tensor
) -> Tensor:
    """For every token the sum over its experts of gate * W_expert x.

    Args:
        structure: of every expert.
        factors: one tensor per factor, in the order of `structure.factors`, each of shape (number of experts, *shape
            of the factor).
        x: (n, in_features).
        experts: (n, active), int64, which ones; any load, none for some and all for one included.
        gates: (n, active), their weights, of the dtype of x.

    Returns:
        (n, out_features); differentiable in factors, x and gates.
    """
    y: Tensor = _Grouped.apply(structure, x, experts, gates, *factors)  # type: ignore[no-untyped-call]
    return y


class _Pairs:
    """The pairs of tokens and experts, sorted by expert; those of a token in the order of its experts."""

    def __init__(self, experts: Tensor, count: int) -> None:
        flat = experts.flatten()
        self.order = flat.argsort(stable=True)
        self.tokens = self.order // experts.shape[1]
        ends = torch.bincount(flat, minlength=count).cumsum(0).tolist()
        self.slices = [slice(a, b) for a, b in itertools.pairwise([0, *ends])]

    def nonempty(self) -> list[tuple[int, slice]]:
        return [(e, s) for e, s in enumerate(self.slices) if s.stop > s.start]


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, structure: Structure, x: Tensor, experts: Tensor, gates: Tensor, *factors: Tensor) -> Tensor:
        pairs = _Pairs(experts, factors[0].shape[0])
        ctx.structure = structure
        ctx.save_for_backward(x, experts, gates, *factors)
        if tiles.unsupported(structure, x.dtype, x.device) is None:
            first = torch.tensor([0, *(part.stop for part in pairs.slices)])
            return tiles.forward_grouped(structure, factors, x, first, pairs.order, gates).sum(1)
        scales = gates.flatten()
        y = x.new_empty(experts.numel(), structure.out_features)
        for e, part in pairs.nonempty():
            inputs = x[pairs.tokens[part]] * scales[pairs.order[part], None]
            run = _executor(structure, inputs, training=False)
            y[pairs.order[part]] = run.forward(structure, [factor[e] for factor in factors], inputs, None, False)[0]
        return y.view(*experts.shape, -1).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, experts, gates, *factors = ctx.saved_tensors
        structure: Structure = ctx.structure
        pairs = _Pairs(experts, factors[0].shape[0])
        needs_x, _, needs_gates, *needs_factors = ctx.needs_input_grad[1:]
        if tiles.unsupported(structure, x.dtype, x.device) is None:
            first = torch.tensor([0, *(part.stop for part in pairs.slices)])
            dx, found = tiles.backward_grouped(
                structure, factors, x, first, pairs.order, gates, grad, needs_x or needs_gates, needs_factors
            )
            return (None, *_through_gates(dx, x, experts, gates, needs_x, needs_gates), *found)
        scales = gates.flatten()
        dx = x.new_empty(experts.numel(), structure.in_features) if needs_x or needs_gates else None
        found = [torch.zeros_like(factor) if needed else None for factor, needed in zip(factors, needs_factors)]
        for e, part in pairs.nonempty():
            inputs = x[pairs.tokens[part]] * scales[pairs.order[part], None]
            of_expert = [factor[e] for factor in factors]
            run = _executor(structure, inputs, training=True)
            part_x, part_factors = run.backward(
                structure, of_expert, inputs, grad[pairs.tokens[part]], [], dx is not None, needs_factors
            )
            if dx is not None:
                dx[pairs.order[part]] = part_x
            for total, own in zip(found, part_factors):
                if total is not None:
                    total[e] = own
        return (None, *_through_gates(dx, x, experts, gates, needs_x, needs_gates), *found)


def _through_gates(
    dx: Tensor | None, x: Tensor, experts: Tensor, gates: Tensor, needs_x: bool, needs_gates: bool
) -> tuple[Tensor | None, None, Tensor | None]:
    """From the gradients of the gated inputs of all pairs those of x and of the gates."""
    if dx is None:
        return None, None, None
    dx = dx.view(*experts.shape, -1)
    dgates = torch.einsum("nki,ni->nk", dx, x) if needs_gates else None
    return torch.einsum("nki,nk->ni", dx, gates) if needs_x else None, None, dgates


def _executor(structure: Structure, x: Tensor, training: bool) -> Any:
    name = dispatch.choose(structure, x.shape[0], x.dtype, x.device, training).executor
    return executors.find("bmm" if name == "reference" else name)
