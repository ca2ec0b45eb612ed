"""The context of a call: who looks at it (eager, traced, plain), autocast, and the backend that a user forces."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from einlinear.ops.backends import check_name
from einlinear.ops.operands import Operands, Routing


class Forced(NamedTuple):
    """A user's choice with `backend`; None leaves the choice to the library."""

    backend: str | None = None
    recompute: bool | None = None


_NOTHING = Forced()
# one entry for every open `backend` block, the outermost first
_FORCED: ContextVar[tuple[Forced, ...]] = ContextVar("einlinear.backend", default=())


@contextmanager
def backend(backend: str | None = None, *, recompute: bool | None = None) -> Iterator[None]:
    """Force the backend of structured layers, in this thread or asyncio task, as long as the context lasts.

    A new task starts with what is forced where it is created, a new thread only in a copy of the context
    (`contextvars.copy_context`). A backward pass uses the backend of its forward pass, in any thread. A compiled
    function keeps what was forced when it was traced; inside of it, the context ends the graph. Also a decorator.

    Args:
        backend: "reference" (plain einsum), "batched" (batched matmuls), "cpu" (compiled CPU kernel), "triton" (GPU
            kernels); None leaves the choice to the library, or to a context around this one.
        recompute: whether the backward pass recomputes the intermediates between factors (True) or finds them saved
            (False); None leaves it to the library, which does what was measured to be faster.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: on use, a backend that cannot run the layer.

    Example:
        >>> import torch, einlinear as el
        >>> layer, x = el.Linear(64, 64, "btt"), torch.randn(2, 64)
        >>> with el.backend("reference"):
        ...     y = layer(x)
        >>> torch.allclose(y, layer(x), atol=1e-5)
        True
    """
    entry = Forced(None if backend is None else check_name(backend), recompute)
    _FORCED.set((*_FORCED.get(), entry))
    try:
        yield
    finally:
        # removes only its entry: generators end in any order, and may be closed in another context than they began in
        _FORCED.set(tuple(block for block in _FORCED.get() if block is not entry))


def forced() -> Forced:
    """Return what is forced in this thread or task: the innermost block decides."""
    result = _NOTHING
    for backend, recompute in _FORCED.get():
        result = Forced(backend or result.backend, result.recompute if recompute is None else recompute)
    return result


class CallContext(enum.Enum):
    """Who looks at a call, and so how it has to be computed."""

    # by a backend's functions
    EAGER = enum.auto()
    # by an operator of this library, for torch.compile, fake tensors and dispatch modes
    TRACED = enum.auto()
    # in torch's operators alone, which any runtime, transform or kind of tensor knows
    PLAIN = enum.auto()


_EAGER_TYPES = {Tensor, nn.Parameter, type(None)}


def call_context(*tensors: Tensor | None) -> CallContext:
    """Return the context of a call with these tensors."""
    if torch.compiler.is_compiling():
        return CallContext.PLAIN if torch.compiler.is_exporting() else CallContext.TRACED
    if is_exported() or is_transformed():
        return CallContext.PLAIN
    traced = torch._C._len_torch_dispatch_stack() > 0
    for tensor in tensors:
        if type(tensor) not in _EAGER_TYPES:
            # other kinds of tensors have rules of their own
            if type(tensor) is not FakeTensor:
                return CallContext.PLAIN
            traced = True
    return CallContext.TRACED if traced else CallContext.EAGER


def is_ordinary() -> bool:
    """Return whether nothing traces, transforms, observes or casts a call, or forces its backend."""
    return is_unobserved() and not _FORCED.get()


def is_unobserved() -> bool:
    """Return whether nothing traces, transforms, observes or casts a call."""
    # without calls of the functions below: small layers feel every microsecond
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_any_autocast_enabled()
        or forward_ad._current_level >= 0
    )


def is_exported() -> bool:
    """Return whether torch.export, torch.jit.trace or an exporter on top of them records a call."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def is_transformed() -> bool:
    """Return whether torch.func or a forward-mode derivative transforms a call."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_differentiated_again(grad: Tensor, *others: Tensor | None) -> bool:
    """Return whether a backward pass is itself differentiated, or batched, so that it needs plain operators."""
    plain = torch.is_grad_enabled() or call_context(grad, *others) is CallContext.PLAIN
    return plain or torch._C._functorch.is_legacy_batchedtensor(grad)


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Return whether a backward pass may follow."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def autocast(operands: Operands) -> Operands:
    """Return the operands, cast as autocast says, if it is on; gates always get the dtype of x."""
    if operands.routing is None and not torch._C._is_any_autocast_enabled():
        return operands
    structure, factors, x, bias, routing = operands
    x, bias, *factors = autocast_operands(x, bias, *factors)
    if routing is not None:
        routing = Routing(routing.indices, routing.gates.to(x.dtype))
    return Operands(structure, factors, x, bias, routing)


def autocast_operands(x: Any, *others: Any) -> tuple[Any, ...]:
    """Return x and other operands of products with x, cast as autocast says, if it is on."""
    dtype, operands = autocast_dtype(x), (x, *others)
    return operands if dtype is None else tuple(tensor.to(dtype) if _is_cast(tensor) else tensor for tensor in operands)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context that disables autocast, if it is enabled: torch.export cannot save one that is not needed."""
    return torch.autocast(device_type, enabled=False) if _autocasts(device_type) else nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype to which autocast casts an input, or None where it does not."""
    casts = torch._C._is_any_autocast_enabled() and _autocasts(x.device.type) and _is_cast(x)
    return torch.get_autocast_dtype(x.device.type) if casts else None


def _autocasts(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _is_cast(tensor: Any) -> bool:
    """Return whether autocast touches such an operand at all."""
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
