"""`FeedForwardStructure`: layers and sizes of a block, the check of its operands, and the block layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from einlinear.ops.activation_functions import ACTIVATIONS, check_activation
from einlinear.ops.operands import Operands
from einlinear.structures import Structure


class FeedForwardStructure(NamedTuple):
    """Structure of a feed-forward block: methods take its tensors in one list, factors and bias of every layer."""

    # of up, of gate if there is one, and of down
    structures: tuple[Structure, ...]
    has_bias: tuple[bool, ...]
    activation: str
    residual: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the layers, in the order of `structures`."""
        return ("up", "gate", "down") if len(self.structures) == 3 else ("up", "down")

    @property
    def features(self) -> tuple[int, int, int]:
        """The numbers of input, hidden and output features."""
        return self.structures[0].in_features, self.structures[0].out_features, self.structures[-1].out_features

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one input vector."""
        return sum(structure.macs for structure in self.structures)

    def split(self, tensors: Sequence[Any]) -> list[tuple[Sequence[Any], Any]]:
        """Return the factors and the bias, or None, of each layer, given one entry for every tensor."""
        layers, start = [], 0
        for structure, has_bias in zip(self.structures, self.has_bias):
            end = start + len(structure.factors)
            layers.append((tensors[start:end], tensors[end] if has_bias else None))
            start = end + has_bias
        return layers

    def compute(self, multiply: Callable[[Operands], Tensor], x: Tensor, *tensors: Tensor) -> Tensor:
        """Return y layer by layer, given a function that multiplies."""

        def layer(index: int, source: Tensor) -> Tensor:
            return multiply(Operands(self.structures[index], layers[index][0], source, layers[index][1]))

        layers, activation = self.split(tensors), ACTIVATIONS[self.activation]
        hidden = layer(0, x)
        hidden = activation(layer(1, x)) * hidden if len(layers) == 3 else activation(hidden)
        y = layer(-1, hidden)
        return y + x if self.residual else y

    def check_sizes(self) -> None:
        """Raise ValueError unless the layers fit one another and the activation is known."""
        check_activation(self.activation)
        up, *gate, down = self.structures
        if down.in_features != up.out_features:
            raise ValueError(f"down reads {down.in_features} hidden features, but up writes {up.out_features}")
        for structure in gate:
            if (structure.in_features, structure.out_features) != (up.in_features, up.out_features):
                sizes = f"{structure.in_features} -> {structure.out_features} features"
                raise ValueError(f"gate is of {sizes}, but must be of {up.in_features} -> {up.out_features} as up is")
        if self.residual and down.out_features != up.in_features:
            sizes = f"down writes {down.out_features} features, but the input has {up.in_features}"
            raise ValueError(f"{sizes}: with residual=True both must be equal")

    def check(self, x: Tensor, tensors: Sequence[Tensor], grad: Tensor | None = None, memory: bool = True) -> bool:
        """Check x, the tensors and the gradient of y as `Operands.check` does; errors name the layer."""
        is_negated = False
        for name, structure, (factors, bias) in zip(self.names, self.structures, self.split(tensors)):
            is_last = name == "down"
            try:
                # hidden features may never be in memory: one number stands for all
                source = x.new_empty(1).expand(x.shape[0], structure.in_features) if is_last else x
                operands = Operands(structure, factors, source, bias)
                is_negated |= operands.check(grad if is_last else None, memory=memory)
            except (RuntimeError, TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from None
        return is_negated
