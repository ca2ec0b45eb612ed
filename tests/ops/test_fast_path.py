"""The fast path to the kernel: which calls take it, and that it gives what the general way gives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from tests.families import SAMPLES, structures
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import einlinear as el
from einlinear import ops
from einlinear.ops import linear_function
from einlinear.ops.cpu import fast_path

SPECS = [spec for specs in SAMPLES.values() for spec in specs]


@pytest.fixture
def general(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What went the general way."""
    why = ops.reason_unsupported("cpu", el.structure("btt", 16, 16), torch.float32, "cpu")
    if why is not None:
        pytest.skip(why)  # where CI=true, test_cpu.py fails
    calls: list[object] = []
    original = linear_function._linear
    monkeypatch.setattr(linear_function, "_linear", lambda *arguments: (calls.append(1), original(*arguments))[1])
    return calls


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1, 3), (40,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS)
def test_it_gives_what_the_general_way_gives(
    spec: str, dtype: torch.dtype, shape: tuple[int, ...], general: list[object]
) -> None:
    structure = structures(spec, [(36, 36), (37, 41)])[-1]
    layer = el.Linear(structure.in_features, structure.out_features, structure, dtype=dtype).requires_grad_(False)
    x = torch.randn(*shape, layer.in_features, dtype=dtype)
    y = layer(x)
    assert general == ([] if el.explain(layer, x).backend == "cpu" else [1])
    with el.backend(el.explain(layer, x).backend):
        assert torch.equal(y, layer(x))


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS)
def test_gradients_are_those_of_the_general_way(
    spec: str, dtype: torch.dtype, wanted: tuple[bool, bool], general: list[object]
) -> None:
    structure = structures(spec, [(36, 36), (37, 41)])[-1]
    layer = el.Linear(structure.in_features, structure.out_features, structure, dtype=dtype)
    x = torch.randn(5, layer.in_features, dtype=dtype).requires_grad_(wanted[0])
    layer.requires_grad_(wanted[1])
    grad, tensors = (
        torch.randn(5, layer.out_features, dtype=dtype),
        [t for t in (x, *layer.parameters()) if t.requires_grad],
    )
    found = torch.autograd.grad(layer(x), tensors, grad)
    backend = el.explain(layer, x).backend
    assert general == ([] if backend == "cpu" else [1])
    with el.backend(backend, recompute=True):
        expected = torch.autograd.grad(layer(x), tensors, grad)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_what_changed_before_the_backward_pass_goes_the_general_way(general: list[object]) -> None:
    layer, x = el.Linear(16, 12, "low_rank(rank=4)"), torch.randn(3, 16)
    before, y, ones = layer.A.data, layer(x), torch.ones(3, 12)
    layer.A.data = torch.zeros_like(before)
    (grad,) = torch.autograd.grad(y, layer.B, ones)
    assert not grad.any(), "that of B is made of A"
    y = layer(x)
    layer.B.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="the memory of factor B is smaller"):
        y.backward(ones)
    assert not general


def test_a_subclass_may_compute_its_factors() -> None:
    class Doubled(el.Linear):
        def factors(self) -> list[Tensor]:
            first, *others = super().factors()
            return [2 * first, *others]

    layer, x = Doubled(16, 12, "low_rank(rank=4)", bias=False), torch.randn(3, 16)
    torch.testing.assert_close(layer(x), x @ layer.dense_weight().T)


def test_gradients_of_gradients(general: list[object]) -> None:
    layer, x = el.Linear(8, 6, "btt(rank=2)", dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradgradcheck(layer, x)
    assert not general


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "a forced backend": lambda: el.backend("reference"),
    "a dispatch mode": lambda: FlopCounterMode(display=False),
    "forward-mode derivatives": forward_ad.dual_level,
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_what_needs_care_goes_the_general_way(context: str, general: list[object]) -> None:
    layer, x = el.Linear(64, 64, "btt"), torch.randn(3, 64)
    with torch.no_grad():
        layer(x)
        assert not general
        with CONTEXTS[context]():
            layer(x)
    assert general


@pytest.mark.parametrize("context", CONTEXTS)
def test_backward_passes_that_need_care(context: str, general: list[object]) -> None:
    layer, x = el.Linear(64, 64, "btt"), torch.randn(3, 64)
    y, grad = layer(x), torch.randn(3, 64)
    expected = torch.autograd.grad(y, [*layer.parameters()], grad, retain_graph=True)
    with CONTEXTS[context]():
        found = torch.autograd.grad(y, [*layer.parameters()], grad)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert not general


def test_batched_gradients(general: list[object]) -> None:
    layer, x = el.Linear(8, 6, "btt"), torch.randn(3, 8)
    y, grads = layer(x), torch.randn(5, 3, 6)
    batched = torch.autograd.grad(y, [*layer.parameters()], grads, retain_graph=True, is_grads_batched=True)
    single = [torch.autograd.grad(y, [*layer.parameters()], grad, retain_graph=True) for grad in grads]
    for a, b in zip(batched, zip(*single, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))
    assert not general


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, in forward mode
def test_forward_derivatives_of_gradients(general: list[object]) -> None:
    layer, x = el.Linear(8, 6, "btt"), torch.randn(3, 8)
    y, grad, tangent = layer(x), torch.randn(3, 6), torch.randn(3, 6)
    (expected,) = torch.autograd.grad(y, layer.A, tangent, retain_graph=True)
    with forward_ad.dual_level():
        (found,) = torch.autograd.grad(y, layer.A, forward_ad.make_dual(grad, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(found).tangent, expected)
    assert not general


OPERANDS: dict[str, Callable[[Tensor], Any]] = {
    "strided": lambda t: t.t().contiguous().t(),
    "negated": lambda t: torch._neg_view(-t),
    "a subclass": lambda t: t.as_subclass(type("Subclass", (Tensor,), {})),
}


@pytest.mark.parametrize("kind", OPERANDS)
@pytest.mark.parametrize("which", ["x", "A"])
def test_unusual_operands_go_the_general_way(kind: str, which: str, general: list[object]) -> None:
    structure = el.structure("low_rank(rank=4)", 16, 12)
    factors, x = [torch.randn(shape) for shape in structure.shapes], torch.randn(3, 16)
    expected = ops.linear(structure, factors, x)
    assert not general
    if which == "x":
        x = OPERANDS[kind](x)
    else:
        factors[0] = OPERANDS[kind](factors[0])
    torch.testing.assert_close(Tensor(ops.linear(structure, factors, x).as_subclass(Tensor)), expected)
    assert general


def test_threads_are_asked_for_in_every_call(general: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = el.Linear(1024, 1024, "btt").requires_grad_(False), torch.randn(100, 1024)
    layer(x)
    call = fast_path._prepare(layer.structure, x.shape, x.dtype, True, False)
    assert call is not None
    assert call.is_parallel
    asked: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: asked.append(1) or 1)
    assert torch.equal(layer(x), layer(x))
    assert len(asked) == 2
