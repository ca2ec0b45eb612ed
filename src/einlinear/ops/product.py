"""A structured product: what every backend computes, and the gradients that it returns.

Shapes: n tokens; with a routing, every token is multiplied with the matrices of `active` experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from einlinear.structures import Structure


class Assignment(NamedTuple):
    """The experts that every token is routed to, and their gates.

    A gate scales the input of an expert, not its output: then the gradient of the gate is a product of two vectors
    that the backward pass has at hand, and nothing but the input needs to be saved.

    Attributes:
        indices: (n, active), int64, the experts of every token, in any order and of any load.
        gates: (n, active), their weights.
    """

    indices: Tensor
    gates: Tensor


class Product(NamedTuple):
    """The operands of y = x Wᵀ + bias, where W has a structure.

    With a routing, y = sum over the experts e of a token of gate_e * W_e x, plus the bias.

    Attributes:
        structure: of the matrix, or of every expert's.
        factors: one tensor per factor, in the order and of the shapes of `structure.factors`; with a routing, stacks
            of these, of shape (experts, *shape).
        x: (n, in_features).
        bias: (out_features,) or None.
        routing: the experts of every token, or None for a single matrix.
    """

    structure: Structure
    factors: Sequence[Tensor]
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

    def resolve_neg(self) -> Product:
        """Return the product with operands whose negation torch has put off (`Tensor.is_neg`) negated in memory."""
        bias, routing = self.bias, self.routing
        return Product(
            self.structure,
            [factor.resolve_neg() for factor in self.factors],
            self.x.resolve_neg(),
            None if bias is None else bias.resolve_neg(),
            None if routing is None else Assignment(routing.indices, routing.gates.resolve_neg()),
        )


class Gradients(NamedTuple):
    """The gradients of a product, None where they are not needed: of x, of the gates, and of every factor."""

    x: Tensor | None
    gates: Tensor | None
    factors: list[Tensor | None]
