"""`LazyHidden`: hidden features of a feed-forward block, computed when their values are used, which may be never."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function
from torch.utils._pytree import tree_map_only

from einlinear import ops
from einlinear.fusion import pointwise
from einlinear.fusion.pointwise import FIRST, IN_PLACE, RECORDED, Expression, Slot
from einlinear.nn.lazy_tensor import METADATA, LazyTensor, placeholder
from einlinear.ops.autograd import direct_apply, plain_gradients
from einlinear.ops.context import is_unobserved, wants_gradients, without_autocast


class DeferredCall:
    """A call of a structured layer that was not computed yet."""

    __slots__ = ("grad_mode", "needs_gradients", "placeholder", "results", "version", "weights", "x")

    def __init__(self, x: Tensor, weights: ops.Weights, results: list[ref[LazyHidden]]) -> None:
        # whatever is made of the call is added to its results
        self.x, self.weights, self.results = x, weights, results
        self.grad_mode, self.version = torch.is_grad_enabled(), _version(x)
        self.needs_gradients = wants_gradients(*self.tensors)
        self.placeholder = placeholder((*x.shape[:-1], weights.structure.out_features), x.dtype, x.device)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.x, self.weights.bias, *self.weights.factors

    def is_like(self, other: DeferredCall) -> bool:
        """Return whether pointwise functions can take the results of both."""
        a, b = self.placeholder, other.placeholder
        return (a.shape, a.dtype, a.device, self.grad_mode) == (b.shape, b.dtype, b.device, other.grad_mode)

    def compute(self, x: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        """Return what the layer would have returned, for its own tensors or others."""
        return ops.linear(self.weights.structure, factors, x, bias)

    @property
    def has_changed_input(self) -> bool:
        return _version(self.x) != self.version

    def check_input(self) -> None:
        """Raise RuntimeError if the input was overwritten, so that its values are lost."""
        if self.has_changed_input:
            raise RuntimeError(
                "the input of a fused feed-forward block was changed in place before the block ended. "
                "Run the model unfused: el.unfuse(model)"
            )

    def values_used(self, function: Any) -> None:
        """Take note of a function that needs the values, so that the block cannot run fused."""


class HiddenExpression(NamedTuple):
    """Hidden features as an expression of one or two deferred calls."""

    calls: tuple[DeferredCall, ...]
    expression: Expression = FIRST

    @property
    def tensors(self) -> list[Tensor | None]:
        return [tensor for call in self.calls for tensor in call.tensors]

    def compute(self, tensors: Sequence[Any] | None = None) -> Tensor:
        """Return the values, in the current gradient mode and without autocast."""
        given, values = iter(self.tensors if tensors is None else tensors), []
        with without_autocast(self.calls[0].x.device.type):
            for call in self.calls:
                call.check_input()
                values.append(call.compute(*[next(given) for _ in call.tensors]))
            return pointwise.evaluate(self.expression, values)


class LazyHidden(LazyTensor):
    """Hidden features of a block: pointwise functions are recorded, all others get the values.

    The values are what the layers would have returned, in the gradient mode in which they were called.
    """

    _hidden: HiddenExpression
    _value: Tensor | None

    @staticmethod
    def __new__(cls, hidden: HiddenExpression) -> LazyHidden:
        call = hidden.calls[0]
        # data has a version of its own: lazy hidden features are not overwritten where others are
        self = Tensor._make_subclass(cls, call.placeholder.data if call.needs_gradients else call.placeholder)
        self._hidden, self._value = hidden, None
        call.results.append(ref(self))
        return self

    @property
    def hidden(self) -> HiddenExpression | None:
        """The expression, or None once the values were used, and may have been changed."""
        return self._hidden if self._value is None else None

    def value(self, function: Any = None) -> Tensor:
        """Return the hidden features as an ordinary tensor, for a function or, if None, for anything."""
        if self._value is None:
            for call in self._hidden.calls:
                call.values_used(function)
            with torch.set_grad_enabled(self._hidden.calls[0].grad_mode):
                self._value = self._hidden.compute()
        return self._value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA and not (args and args[0]._value is not None):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if (recorded := _record(func, args, kwargs)) is not None:
            return recorded

        def value(hidden: LazyHidden) -> Tensor:
            return hidden.value(func)

        return func(*tree_map_only(cls, value, args), **tree_map_only(cls, value, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # calls that bypass __torch_function__, below autograd: values that they compute have no gradients
        def value(hidden: LazyHidden) -> Tensor:
            if hidden._value is not None:
                return hidden._value
            for call in hidden._hidden.calls:
                call.values_used(func)
            return hidden._hidden.compute()

        return func(*tree_map_only(cls, value, args), **tree_map_only(cls, value, kwargs or {}))


def defer(call: DeferredCall) -> LazyHidden:
    """Return the result of a call that was not computed."""
    return _lazy(HiddenExpression((call,)))


def _lazy(hidden: HiddenExpression, into: LazyHidden | None = None) -> LazyHidden:
    """Return lazy hidden features, by themselves or in the place of others, whose gradients reach all tensors."""
    if hidden.calls[0].needs_gradients or hidden.calls[-1].needs_gradients:
        # autograd clears the hooks of a tensor that is overwritten
        with nullcontext() if into is None else torch._C.DisableTorchFunctionSubclass():
            return _apply_differentiable(hidden, into, *hidden.tensors)  # type: ignore[no-any-return]
    if into is None:
        return LazyHidden(hidden)
    into._hidden = hidden
    return into


class _Differentiable(Function):
    """Lazy hidden features for code below Python, such as other autograd functions, whose gradients end up here."""

    @staticmethod
    def forward(ctx: Any, hidden: HiddenExpression, into: LazyHidden | None, *tensors: Tensor | None) -> LazyHidden:
        # not among the saved tensors, which activation checkpointing counts
        ctx.hidden = hidden
        if into is None:
            return LazyHidden(hidden)
        ctx.mark_dirty(into)
        into._hidden = hidden
        return into

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, needed = ctx.hidden, ctx.needs_input_grad[2:]
        return None, None, *plain_gradients(lambda *tensors: hidden.compute(tensors), hidden.tensors, needed, grads[0])


_apply_differentiable = direct_apply(_Differentiable)


def _record(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LazyHidden | None:
    """Return the result of a pointwise function without computing it, or None if the values have to be computed."""
    target: Any = args[0] if args else None
    function = IN_PLACE.get(func, func)
    is_in_place = function is not func or bool(kwargs.get("inplace"))
    if function not in RECORDED:
        is_same = isinstance(target, LazyHidden) and _returns_its_input(func, target, args, kwargs)
        return target if is_same and target.hidden is not None else None
    if is_in_place and not isinstance(target, LazyHidden):
        return None
    calls = _calls_of([argument for argument in args if isinstance(argument, LazyHidden)])
    if calls is None:
        return None
    arguments = [_expression(argument, calls) if isinstance(argument, LazyHidden) else argument for argument in args]
    plain = {name: value for name, value in kwargs.items() if name != "inplace"}
    expression = pointwise.call(function, arguments, plain)
    if expression is None:
        return None
    return _lazy(HiddenExpression(calls, expression), target if is_in_place else None)


def _expression(lazy: LazyHidden, calls: tuple[DeferredCall, ...]) -> Expression:
    """Return the expression of lazy hidden features, with slots for calls among which are their own."""
    own, expression = lazy._hidden
    if own[0] is calls[0] and (len(own) == 1 or own[1] is calls[1]):
        return expression
    return pointwise.with_slots(expression, [Slot(calls.index(call)) for call in own])


def _calls_of(sources: Sequence[LazyHidden]) -> tuple[DeferredCall, ...] | None:
    """Return the calls behind lazy hidden features, if one expression can have them all, or None."""
    calls = sources[0]._hidden.calls if sources else ()
    for source in sources:
        if source._value is not None:
            return None
        for call in source._hidden.calls:
            if call not in calls:
                calls = (*calls, call)
    if not 1 <= len(calls) <= 2 or calls[0].grad_mode != torch.is_grad_enabled() or not is_unobserved():
        return None
    return calls if calls[0] is calls[-1] or calls[0].is_like(calls[-1]) else None


def _returns_its_input(func: Any, hidden: LazyHidden, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether a function returns hidden features as they are: dropout in evaluation, a cast to their dtype."""
    if func in (F.dropout, torch.dropout):
        names = ("input", "p", "training") if func is F.dropout else ("input", "p", "train")
        given = dict(zip(names, args)) | kwargs
        return given.get("p", 0.5) == 0 or not given.get(names[2], True)
    if func is Tensor.contiguous:
        return len(args) == 1 and not kwargs
    if func is Tensor.to:
        targets = [*args[1:], *kwargs.values()]
        plain = {*kwargs} <= {"dtype", "device"} and all(isinstance(t, torch.dtype | torch.device) for t in targets)
        return plain and all(target in (hidden.dtype, hidden.device) for target in targets)
    return False


def _version(x: Tensor) -> int | None:
    """Return the number of changes in place; tensors of inference mode do not count them."""
    return None if x.is_inference() else x._version
