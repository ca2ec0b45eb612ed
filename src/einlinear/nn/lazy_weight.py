"""`LazyWeight`: the dense weight of a layer, built when its values are used: models read its dtype in every call."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

from einlinear.nn.lazy_tensor import METADATA, LazyTensor, placeholder
from einlinear.ops.context import is_exported, is_transformed, wants_gradients, without_autocast

if TYPE_CHECKING:
    from einlinear.nn import MoELinear
    from einlinear.nn.linear import FactoredMatrix

Layer: TypeAlias = "FactoredMatrix | MoELinear"

# functions that read no values: of their argument (new), and of the tensor that gives dtype or shape (like)
_NEW = frozenset(
    [getattr(Tensor, f"new_{kind}") for kind in ("empty", "zeros", "ones", "full", "tensor")]
    + [getattr(torch, f"{kind}_like") for kind in ("empty", "zeros", "ones", "full", "rand", "randn")]
)
_LIKE = frozenset([Tensor.to, Tensor.type_as, Tensor.view_as, Tensor.expand_as, Tensor.reshape_as])


def weight_of(layer: Layer) -> Tensor:
    """Return the dense weight of a layer; on the meta device while some of its parameters are."""
    parameters = layer.weight_parameters()
    # operations that are recorded hide the uses of a tensor
    is_traced = (
        torch.compiler.is_compiling()
        or is_exported()
        or is_transformed()
        or any(isinstance(parameter, FakeTensor) for parameter in parameters)
        # torch.fx puts other objects in the places of parameters
        or not isinstance(getattr(layer, layer.structure.factors[0].name), Tensor)
    )
    if is_traced:
        return _build(layer)
    if any(parameter.is_meta for parameter in parameters):
        weight = torch.empty(layer.out_features, layer.in_features, device="meta", dtype=parameters[0].dtype)
        return weight.requires_grad_(any(parameter.requires_grad for parameter in parameters))
    if wants_gradients(*parameters):
        return _Differentiable.apply(layer, *parameters)  # type: ignore[no-any-return, no-untyped-call]
    return LazyWeight(layer, parameters[0])


class LazyWeight(LazyTensor):
    """Dense weight with the values at their first use, in the gradient mode in which the weight was read."""

    _layer: Layer
    _value: Tensor | None
    _dtype: torch.dtype
    _device: torch.device

    @staticmethod
    def __new__(cls, layer: Layer, like: Tensor) -> LazyWeight:
        dtype, device = like.dtype, like.device
        self = Tensor._make_subclass(cls, placeholder((layer.out_features, layer.in_features), dtype, device))
        self._layer, self._value, self._dtype, self._device = layer, None, dtype, device
        return self

    # models read these in every call: they do not even go through __torch_function__
    dtype = property(lambda self: self._dtype)
    device = property(lambda self: self._device)

    def value(self, function: Any = None) -> Tensor:
        """Return the dense weight as an ordinary tensor; differentiable in the factors."""
        # activation checkpointing compares the tensors saved by the first and by the second forward pass
        is_checkpointed = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        if self._value is not None and not is_checkpointed:
            return self._value
        with torch.set_grad_enabled(self.requires_grad):
            value = _build(self._layer)
        if not is_checkpointed:
            self._value = value
        return value

    def placeholder(self) -> Tensor:
        return placeholder(self.shape, self.dtype, self.device)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        replace = cls.placeholder if func in _NEW or (func in _LIKE and not isinstance(args[0], cls)) else cls.value
        return func(*tree_map_only(cls, replace, args), **tree_map_only(cls, replace, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # calls that bypass __torch_function__, below autograd
        return func(*tree_map_only(cls, cls.value, args), **tree_map_only(cls, cls.value, kwargs or {}))


class _Differentiable(torch.autograd.Function):
    """Lazy weight whose gradient goes to the parameters of its layer."""

    @staticmethod
    def forward(ctx: Any, layer: Layer, *parameters: Tensor) -> LazyWeight:
        ctx.layer = layer
        ctx.save_for_backward(*parameters)
        return LazyWeight(layer, parameters[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parameters = ctx.saved_tensors
        with torch.enable_grad():
            weight = _build(ctx.layer)
        needed = [p for p, is_needed in zip(parameters, ctx.needs_input_grad[1:], strict=True) if is_needed]
        create = torch.is_grad_enabled()
        grads = iter(torch.autograd.grad(weight, needed, grad, create_graph=create, allow_unused=True))
        return None, *(next(grads) if is_needed else None for is_needed in ctx.needs_input_grad[1:])


def _build(layer: Layer) -> Tensor:
    """Return the dense weight in the dtype of the factors, in memory of its own."""
    stored = next(chain(layer.parameters(), layer.buffers()))
    with without_autocast(stored.device.type):
        weight = layer.dense_weight()
    # a single factor may be its own dense weight
    return weight.clone() if len(layer.structure.factors) == 1 else weight
