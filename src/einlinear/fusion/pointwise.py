"""Pointwise expressions of hidden features, recorded one call at a time, and the activations that they compute.

Models write activations in many ways: GELU alone is a function, a module, or up to eight products and sums. What an
expression computes is found out on sample points, once for each expression, so no class of a model has to be known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from einlinear.ops import ACTIVATIONS

# functions that activations are made of; others, such as clamp, are part of no activation in ACTIVATIONS
_NAMES = "add sub mul div true_divide pow neg exp erf tanh sigmoid relu square gelu silu"
_REFLECTED = (Tensor.__rsub__, Tensor.__rpow__, Tensor.__rdiv__, Tensor.__rtruediv__)
_OWNERS = (torch, Tensor, F, torch.special)
RECORDED: frozenset[Any] = frozenset(
    [getattr(owner, name) for owner in _OWNERS for name in _NAMES.split() if hasattr(owner, name)] + [*_REFLECTED]
)
# functions that overwrite their first argument, and those that compute the same values
IN_PLACE: dict[Any, Any] = {
    getattr(owner, f"{name}_"): getattr(torch, name)
    for owner in (torch, Tensor, F)
    for name in ("add", "sub", "mul", "div", "tanh", "sigmoid", "relu", "square")
    if hasattr(owner, f"{name}_")
}
IN_PLACE |= {Tensor.__iadd__: torch.add, Tensor.__isub__: torch.sub, Tensor.__imul__: torch.mul}
# of an activation in a model, of any kind
MAX_CALLS = 24


class Slot(NamedTuple):
    """The place of hidden features in an expression: of the first layer, or of the second."""

    number: int


class PointwiseCall(NamedTuple):
    """A pointwise call: its arguments are expressions and plain values."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    # calls in it, with its own
    size: int


Expression: TypeAlias = Slot | PointwiseCall
FIRST, SECOND = Slot(0), Slot(1)
_PLAIN = (int, float, str, type(None))
_ARGUMENTS = (Slot, PointwiseCall, *_PLAIN)


class Activation(NamedTuple):
    """An expression's activation; with a gate, the slot whose activation multiplies the other."""

    name: str
    gate: Slot | None


def call(function: Callable[..., Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> PointwiseCall | None:
    """Return the expression of a call, or None for arguments that are neither expressions nor plain values."""
    size = 1
    for argument in args:
        if not isinstance(argument, _ARGUMENTS):
            return None
        size += argument.size if isinstance(argument, PointwiseCall) else 0
    for value in kwargs.values():
        if not isinstance(value, _PLAIN):
            return None
    return PointwiseCall(function, tuple(args), tuple(kwargs.items()), size) if size <= MAX_CALLS else None


def with_slots(expression: Expression, slots: Sequence[Slot]) -> Expression:
    """Return an expression with other slots in the places of the first and the second."""
    if isinstance(expression, Slot):
        return slots[expression.number]
    args = tuple([with_slots(a, slots) if isinstance(a, (Slot, PointwiseCall)) else a for a in expression.args])
    return expression._replace(args=args)


def evaluate(expression: Expression, values: Sequence[Tensor]) -> Tensor:
    """Compute an expression, given the values of its slots."""
    if isinstance(expression, Slot):
        return values[expression.number]
    args = [evaluate(a, values) if isinstance(a, (Slot, PointwiseCall)) else a for a in expression.args]
    return expression.function(*args, **dict(expression.kwargs))


@lru_cache(maxsize=1024)
def find_activation(expression: Expression, is_gated: bool) -> Activation | None:
    """Return the activation that an expression computes, with a gate if it has two slots; None if it is another."""
    with torch.no_grad():
        x = torch.linspace(-12, 12, 193, dtype=torch.float64, device="cpu")
        x = torch.cat([x, x.new_tensor([-1e4, -100, -1e-3, 1e-3, 100, 1e4])])
        if not is_gated:
            return _match(evaluate(expression, [x]), lambda activation: activation(x), None)
        gate, up = x[:, None], x.new_tensor([-40, -1.5, -0.1, 0, 0.3, 2, 100])
        for slot, values in ((FIRST, [gate, up]), (SECOND, [up, gate])):
            if found := _match(evaluate(expression, values), lambda activation: activation(gate) * up, slot):
                return found
    return None


def _match(y: Tensor, expected: Callable[[Callable[[Tensor], Tensor]], Tensor], gate: Slot | None) -> Activation | None:
    # models round the constants of GELU to eight digits
    matches = [n for n, a in ACTIVATIONS.items() if torch.allclose(y, expected(a), rtol=1e-7, atol=1e-7)]
    return Activation(matches[0], gate) if matches else None
