"""A structured product: what every backend computes, and the gradients that it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from einlinear.structures import Structure


class Assignment(NamedTuple):
    """The experts that every token is routed to, and their gates, which scale the inputs of the experts.

    Attributes:
        indices: (n, active), int64, the experts of every token, in any order and of any load.
        gates: (n, active), their weights.
    """

    indices: Tensor
    gates: Tensor


class Product(NamedTuple):
    """The operands of y = x Wᵀ + bias; with a routing, of y = bias + sum of gate_e * W_e x over the experts e."""

    # of the matrix, or of every expert's
    structure: Structure
    # in the order and of the shapes of `structure.factors`; with a routing, stacks of these: (experts, *shape)
    factors: Sequence[Tensor]
    # (n, in_features) and (out_features,)
    x: Tensor
    bias: Tensor | None = None
    routing: Assignment | None = None

    @property
    def experts(self) -> int:
        """The number of stacked matrices; 0 without factors."""
        return len(self.factors[0]) if self.factors else 0

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return x, the bias, the factors and the routing's indices and gates."""
        _, factors, x, bias, routing = self
        return (x, bias, *factors) if routing is None else (x, bias, *factors, *routing)

    @staticmethod
    def of(structure: Structure, x: Tensor, bias: Tensor | None, *others: Tensor) -> Product:
        """Return the product of tensors in the order of `tensors`."""
        count = len(structure.factors)
        routing = Assignment(*others[count:]) if len(others) > count else None
        return Product(structure, others[:count], x, bias, routing)

    def resolve_neg(self) -> Product:
        """Return the product with operands whose negation torch has put off (`Tensor.is_neg`) negated in memory."""
        return Product.of(self.structure, *[t if t is None else t.resolve_neg() for t in self.tensors()])  # type: ignore[arg-type]


class Gradients(NamedTuple):
    """The gradients of a product, None where they are not needed: of x, of the gates, and of every factor."""

    x: Tensor | None
    gates: Tensor | None
    factors: list[Tensor | None]
