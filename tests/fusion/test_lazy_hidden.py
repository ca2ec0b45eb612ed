"""`LazyHidden`: like the hidden features it stands for in everything, and an activation that is recognised."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import vmap
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

import einlinear as el
from einlinear import ops
from einlinear.fusion.fusion_hooks import activation_of
from einlinear.fusion.lazy_hidden import DeferredCall, LazyHidden, defer
from einlinear.nn.lazy_tensor import METADATA_NAMES
from einlinear.ops import ACTIVATIONS

Function = Callable[[Tensor], Any]


def lazy(layer: el.Linear, x: Tensor) -> LazyHidden:
    return defer(DeferredCall(x, ops.Weights(layer.structure, layer.factors(), layer.bias), []))


@pytest.fixture
def layer() -> el.Linear:
    layer = el.Linear(6, 8, "btt")
    nn.init.normal_(layer.bias)
    return layer


def is_computed(hidden: LazyHidden) -> bool:
    return hidden.hidden is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 5, 6)])
def test_metadata_is_free(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    layer, x = el.Linear(6, 8, "btt", dtype=dtype), torch.randn(shape, dtype=dtype)
    hidden, value = lazy(layer, x), layer(x)
    assert isinstance(hidden, Tensor)
    for name in METADATA_NAMES - ({"__len__"} if not value.dim() else set()):
        found, expected = getattr(hidden, name), getattr(value, name)
        assert (found() if callable(found) else found) == (expected() if callable(expected) else expected), name
    assert (torch.numel(input=hidden), len(hidden), hidden.size(-1)) == (value.numel(), len(value), 8)
    assert not is_computed(hidden)
    assert not is_computed(F.gelu(hidden))
    assert "grad_fn" in repr(hidden)
    assert is_computed(hidden)


FUNCTIONS: dict[str, Function] = {
    "arithmetic": lambda h: 0.5 * h * (1 + torch.tanh(0.8 * (h + 0.04 * torch.pow(h, 3)))) / 2 - h,
    "sum": torch.sum,
    "view": lambda h: h.view(-1) @ h.flatten(),
    "index": lambda h: h[..., 1:3],
    "chunk": lambda h: h.chunk(2, -1)[1],
    "list": lambda h: torch.cat([h, F.relu(h), h * 2]),
    "keyword": lambda h: torch.mul(input=h, other=h),
    "array": lambda h: torch.from_numpy(h.detach().numpy()),
    "scalar": lambda h: torch.tensor(h.sum().item() + float(h.detach()[0, 0]) + sum(h[0].tolist())),
    "in place": lambda h: h.mul_(2).add_(1).relu_() - h,
    "in place, then read": lambda h: (F.relu_(h), h)[1],
    "in place, unknown": lambda h: (F.leaky_relu(h, inplace=True), h.neg())[1],
    "in place after a reader": lambda h: (torch.tanh(h), F.relu(h, inplace=True)),
    "augmented": lambda h: augmented(h),
    "data": lambda h: h.data + h.detach(),
    "out": lambda h: torch.add(h, h, out=torch.empty(0)) if not h.requires_grad else h,
    "scripted": lambda h: torch.jit.script(swish)(h),
    "scripted, then read": lambda h: [torch.jit.script(swish)(v) + torch.softmax(v, -1) for v in [F.silu(h)]],
    "custom": lambda h: Twice.apply(torch.sigmoid(Twice.apply(h))),
    "custom in place": lambda h: Twice.apply(F.relu(h, inplace=True)),
    "straight-through": lambda h: Through.apply(h),
    "checkpointed": lambda h: checkpoint(torch.tanh, F.silu(h), use_reentrant=False),
    "checkpointed, reentrant": lambda h: checkpoint(torch.tanh, F.silu(h), use_reentrant=True),
    "without gradients": lambda h: detached(h),
    "with gradients": lambda h: h * h,
    "vmap": lambda h: vmap(torch.tanh)(h),
    "parameter": lambda h: h * torch.nn.Parameter(torch.ones(())),
    "where": lambda h: torch.where(h > 0, h, 0.1 * h),
    "large": lambda h: squared(h),
    "copies": lambda h: copy.deepcopy(h.detach()) + pickle.loads(pickle.dumps(h.detach())),
    "compiled": lambda h: torch.compile(F.silu, backend="eager")(h),
    "dropout": lambda h: F.dropout(F.dropout(h, 0.5, training=False), 0.5, training=True),
    "casts": lambda h: h.to(h.dtype).to(torch.float64).to("cpu").contiguous(),
    "hash": lambda h: {h: h + 1}[h],
}


def augmented(h: Tensor) -> Tensor:
    before = h
    h *= 2
    h -= 1
    return h + before


def detached(h: Tensor) -> Tensor:
    with torch.no_grad():
        scale = torch.sigmoid(h)
    return scale * h


def squared(h: Tensor) -> Tensor:
    for _ in range(6):
        h = h * h
    return h


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Twice(torch.autograd.Function):
    """2 x, whose backward pass needs x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * grads[0] + 0 * x


class Through(torch.autograd.Function):
    """relu(x), with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.relu(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


@pytest.mark.filterwarnings("ignore:.*jit.script.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_get_what_the_layer_would_return(name: str, grad: bool, layer: el.Linear) -> None:
    x = torch.randn(4, 6, requires_grad=True)

    def run(make: Function) -> list[Tensor]:
        torch.manual_seed(0)
        layer.zero_grad()
        x.grad = None
        with torch.set_grad_enabled(grad):
            result = FUNCTIONS[name](make(x))
        results = [result] if isinstance(result, Tensor) else [*result]
        if any(r.requires_grad for r in results):
            sum((r.double() * torch.arange(r.numel()).view(r.shape)).sum() for r in results).backward()  # type: ignore[union-attr]
        grads = [torch.zeros(()) if p.grad is None else p.grad for p in (x, *layer.parameters())]
        return [*(r.detach() + 0 for r in results), *grads]

    expected, found = run(layer), run(lambda x: lazy(layer, x))
    assert [t.dtype for t in expected] == [t.dtype for t in found]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_tensors_that_depend_on_each_other() -> None:
    """A factor that is computed from the input gets its own share alone, also below Python."""
    layer, x = el.Linear(6, 8, "low_rank(rank=2)", bias=False), torch.randn(4, 6, requires_grad=True)

    def gradient(make: Callable[[Tensor, ops.Weights], Tensor]) -> Tensor:
        factors = [factor * x.sum() for factor in layer.factors()]
        y = Twice.apply(make(x, ops.Weights(layer.structure, factors))).square().sum()
        return torch.autograd.grad(y, x)[0]

    found = gradient(lambda x, weights: defer(DeferredCall(x, weights, [])))
    torch.testing.assert_close(found, gradient(lambda x, w: ops.linear(w.structure, w.factors, x)))


def test_changes_in_place_are_those_of_one_tensor(layer: el.Linear) -> None:
    x = torch.randn(4, 6)
    saved = Twice.apply(lazy(layer, x))
    F.relu_(lazy(layer, x))
    saved.sum().backward()
    assert layer.bias.grad is not None


def test_second_derivatives(layer: el.Linear) -> None:
    x = torch.randn(4, 6, requires_grad=True)

    def penalty(hidden: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(Twice.apply(torch.tanh(hidden)).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    torch.testing.assert_close(penalty(lazy(layer, x)), penalty(layer(x)))


@pytest.mark.filterwarnings("ignore:.*jit.script.*:DeprecationWarning")
def test_forward_mode(layer: el.Linear) -> None:
    x = torch.randn(4, 6)
    hidden = lazy(layer, x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(4, 8), torch.ones(4, 8))
        tangent = forward_ad.unpack_dual(torch.sigmoid(hidden) * dual).tangent
    torch.testing.assert_close(tangent, torch.sigmoid(layer(x)))


def test_values_do_not_depend_on_where_they_are_used(layer: el.Linear) -> None:
    x = torch.randn(4, 6)
    hidden = torch.tanh(lazy(layer, x))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        doubled = hidden * 2
    assert doubled.dtype == torch.float32
    assert hidden.requires_grad
    torch.testing.assert_close(doubled, 2 * torch.tanh(layer(x)).detach(), rtol=0, atol=0)


def test_an_input_that_was_overwritten_is_noticed(layer: el.Linear) -> None:
    x = torch.randn(4, 6)
    hidden = F.relu(lazy(layer, x))
    x.zero_()
    with pytest.raises(RuntimeError, match=r"was changed in place before the block ended.*el\.unfuse\(model\)"):
        hidden.sum()
    with torch.inference_mode():
        x = torch.randn(4, 6)
        torch.testing.assert_close(lazy(layer, x) * 1, layer(x))


def recognised(function: Function) -> str | None:
    result = function(lazy(el.Linear(6, 8, "btt"), torch.randn(4, 6)))
    activation = activation_of(result) if isinstance(result, LazyHidden) else None
    return None if activation is None else activation.name


def gelu_of_bloom(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


MADE_OF = {
    "gelu_tanh": gelu_of_bloom,
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu_squared": lambda x: F.relu(x).pow(2),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "tanh": lambda x: 2 * torch.sigmoid(2 * x) - 1,
    "relu": lambda x: F.relu(x, inplace=True).contiguous(),
    "identity": lambda x: F.dropout(x.to(torch.float32), 0.1, training=False),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_recognised(name: str) -> None:
    assert recognised(ACTIVATIONS[name]) == name
    if name in MADE_OF:
        assert recognised(MADE_OF[name]) == name


def test_activations_of_transformers_are_recognised() -> None:
    names = {name: recognised(ACT2FN[name]) for name in ACT2FN if name not in ("xielu", "prelu")}
    assert {name: found for name, found in names.items() if found is not None} == {
        "gelu": "gelu", "gelu_python": "gelu", "relu": "relu", "relu2": "relu_squared", "silu": "silu", "swish": "silu",
        "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh", "linear": "identity",
        "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh", "quick_gelu": "quick_gelu",
        "sigmoid": "sigmoid", "tanh": "tanh",
    }  # fmt: skip


@pytest.mark.parametrize(
    "function",
    [F.mish, F.relu6, F.elu, F.leaky_relu, lambda x: F.gelu(x) * 1.001, lambda x: F.relu(x) + 1e-5, torch.square],
)
def test_other_functions_are_not(function: Function) -> None:
    assert recognised(function) is None


def test_gates() -> None:
    x, first, second = torch.randn(4, 6), el.Linear(6, 8, "btt"), el.Linear(6, 8, "btt")

    def find(function: Callable[[Tensor, Tensor], Any], other: Tensor = x) -> Any:
        hidden = function(lazy(first, x), lazy(second, other))
        activation = activation_of(hidden) if isinstance(hidden, LazyHidden) else None
        if activation is None or activation.gate is None:
            return activation
        gate = hidden._hidden.calls[activation.gate.number].weights.factors[0]
        return activation.name, gate is first.factors()[0]

    assert find(lambda a, b: F.silu(a) * b) == find(lambda a, b: b * F.silu(a)) == ("silu", True)
    assert find(lambda a, b: a * gelu_of_bloom(b)) == ("gelu_tanh", False)
    assert find(lambda a, b: F.relu(a).mul_(b)) == ("relu", True)
    assert find(lambda a, b: a * torch.sigmoid(a) * b) == ("silu", True)
    assert find(lambda a, b: a * b)[0] == "identity"
    for function in (lambda a, b: F.silu(a) + b, lambda a, b: F.silu(a) * F.silu(b), lambda a, b: F.silu(a * b)):
        assert find(function) is None
    # another input, though its values are the same
    assert find(lambda a, b: F.silu(a) * b, x.clone()) is None
