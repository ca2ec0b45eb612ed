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
from einlinear.nn import pointwise
from einlinear.nn.lazy_weight import METADATA, placeholder
from einlinear.nn.pointwise import IN_PLACE, RECORDED, Expression, Slot
from einlinear.ops.context import is_unobserved, wants_gradients, without_autocast


class DeferredCall:
    """A call of a structured layer that was not computed yet."""

    __slots__ = ("grad_mode", "needs_gradients", "results", "version", "weights", "x")

    def __init__(self, x: Tensor, weights: ops.Weights, results: list[ref[LazyHidden]]) -> None:
        # whatever is made of the call is added to its results
        self.x, self.weights, self.results = x, weights, results
        self.grad_mode, self.version = torch.is_grad_enabled(), _version(x)
        self.needs_gradients = wants_gradients(*self.tensors)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.x, self.weights.bias, *self.weights.factors

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


class Hidden(NamedTuple):
    """Hidden features as an expression of one or two deferred calls."""

    calls: tuple[DeferredCall, ...]
    expression: Expression = Slot.FIRST

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


class LazyHidden(Tensor):
    """Hidden features of a block: pointwise functions are recorded, all others get the values.

    The values are what the layers would have returned, in the gradient mode in which they were called.
    """

    _hidden: Hidden
    _value: Tensor | None

    @staticmethod
    def __new__(cls, hidden: Hidden) -> LazyHidden:
        x, structure = hidden.calls[0].x, hidden.calls[0].weights.structure
        shape = (*x.shape[:-1], structure.out_features)
        self = Tensor._make_subclass(cls, placeholder(shape, x.dtype, x.device).data)
        self._hidden, self._value = hidden, None
        hidden.calls[0].results.append(ref(self))
        return self

    @property
    def hidden(self) -> Hidden | None:
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
    return _lazy(Hidden((call,)))


def _lazy(hidden: Hidden, into: LazyHidden | None = None) -> LazyHidden:
    """Return lazy hidden features, by themselves or in the place of others, whose gradients reach all tensors."""
    if any([call.needs_gradients for call in hidden.calls]):
        # autograd clears the hooks of a tensor that is overwritten
        with nullcontext() if into is None else torch._C.DisableTorchFunctionSubclass():
            return _apply_at_once(hidden, into, *hidden.tensors)  # type: ignore[no-any-return]
    if into is None:
        return LazyHidden(hidden)
    into._hidden = hidden
    return into


class _Differentiable(Function):
    """Lazy hidden features for code below Python, such as other autograd functions, whose gradients end up here."""

    @staticmethod
    def forward(ctx: Any, hidden: Hidden, into: LazyHidden | None, *tensors: Tensor | None) -> LazyHidden:
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
        with torch.enable_grad():
            # by other names, since one tensor may have been computed from another: each gets its own share alone
            tensors = [None if tensor is None else tensor.view_as(tensor) for tensor in hidden.tensors]
            value = hidden.compute(tensors)
        wanted = [tensor for tensor, needs in zip(tensors, needed, strict=True) if needs and tensor is not None]
        gradients = iter(torch.autograd.grad(value, wanted, grads[0], create_graph=torch.is_grad_enabled()))
        return None, None, *(next(gradients) if needs else None for needs in needed)


# what `apply` does after it has looked for transforms, of which there are none where calls are deferred
_apply_at_once: Any = super(Function, _Differentiable).apply


def _record(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> LazyHidden | None:
    """Return the result of a pointwise function without computing it, or None if the values have to be computed."""
    target = args[0] if args else None
    if isinstance(target, LazyHidden) and _returns_its_input(func, target, args, kwargs):
        return target if target.hidden is not None else None
    function = IN_PLACE.get(func, func)
    is_in_place = function is not func or bool(kwargs.get("inplace"))
    if function not in RECORDED or (is_in_place and not isinstance(target, LazyHidden)):
        return None
    sources = [argument for argument in args if isinstance(argument, LazyHidden)]
    calls = _calls_of(sources)
    if calls is None:
        return None
    arguments = list(args)
    for i, argument in enumerate(args):
        if isinstance(argument, LazyHidden):
            slots = [Slot(calls.index(call)) for call in argument._hidden.calls]
            arguments[i] = pointwise.with_slots(argument._hidden.expression, slots)
    plain = {name: value for name, value in kwargs.items() if name != "inplace"}
    expression = pointwise.call(function, arguments, plain)
    if expression is None:
        return None
    return _lazy(Hidden(calls, expression), target if is_in_place else None)


def _calls_of(sources: Sequence[LazyHidden]) -> tuple[DeferredCall, ...] | None:
    """Return the calls behind lazy hidden features that one expression can have, or None."""
    calls: list[DeferredCall] = []
    for source in sources:
        if source.hidden is None:
            return None
        calls += [call for call in source.hidden.calls if call not in calls]
    if not 1 <= len(calls) <= 2 or not is_unobserved() or calls[0].grad_mode != torch.is_grad_enabled():
        return None
    first, last = calls[0], calls[-1]
    sizes = {(call.x.shape[:-1], call.weights.structure.out_features) for call in calls}
    is_alike = len(sizes) == 1 and first.x.dtype == last.x.dtype and first.x.device == last.x.device
    return tuple(calls) if is_alike and first.grad_mode == last.grad_mode else None


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
