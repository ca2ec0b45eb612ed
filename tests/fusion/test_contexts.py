"""Fused blocks under compilers, transforms, modes and threads."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.fusion.blocks import Block, check
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import einlinear as el

CONTEXTS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "compiled": lambda m, x: torch.compile(m, backend="eager", fullgraph=True)(x),
    "forward compiled": lambda m, x: functional_compile(m, x),
    "exported": lambda m, x: torch.export.export(m, (x,)).module()(x),
    "traced": lambda m, x: torch.jit.trace(m, x, check_trace=False)(x),
    "symbolic": lambda m, x: fx.symbolic_trace(m)(x),
    "vmap": lambda m, x: vmap(m)(x),
    "grad": lambda m, x: grad(lambda x: m(x).sum())(x),
    "jvp": lambda m, x: jvp(m, (x,), (x,))[1],
    "forward mode": lambda m, x: forward_derivative(m, x),
    "batched gradients": lambda m, x: batched(m, x),
    "functional call": lambda m, x: functional_call(m, {"up.A": m.up.A.detach() * 2}, (x,)),
    "autocast": lambda m, x: autocast(m, x),
    "FLOP counter": lambda m, x: flops(m, x),
    "fake tensors": lambda m, x: fake(m, x),
}


# of these, the ones in which nothing looks at the calls
STILL_FUSED = {"functional call", "batched gradients"}


def functional_compile(model: nn.Module, x: Tensor) -> Tensor:
    model = copy.deepcopy(model)
    model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]
    return model(x)  # type: ignore[no-any-return]


def forward_derivative(model: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def batched(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x), x, torch.ones(2, *x.shape), is_grads_batched=True)[0]


def autocast(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)  # type: ignore[no-any-return]


def flops(model: nn.Module, x: Tensor) -> Tensor:
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return torch.tensor(counter.get_total_flops())


def fake(model: nn.Module, x: Tensor) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        shape = model(mode.from_tensor(x)).shape
    return torch.tensor(shape)


@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", CONTEXTS)
def test_compilers_transforms_and_modes(name: str, fused: list[str]) -> None:
    function = nn.Sequential(nn.GELU(), nn.Dropout(0.0))
    model, x = Block(function if name != "symbolic" else nn.GELU()), torch.randn(4, 16)
    if name == "traced":
        model.eval()
    expected = CONTEXTS[name](model, x)
    torch.compiler.reset()
    el.fuse(model)
    found = CONTEXTS[name](model, x)
    assert bool(fused) is (name in STILL_FUSED)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.dtype == expected.dtype
    # in eager mode again
    model(x)
    assert fused


def test_autocast_inside_of_a_module(fused: list[str]) -> None:
    class Casts(Block):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.training):
                return super().forward(x)

    check(Casts(F.relu), fused, 0, blocks=1)

    class CastsLast(Casts):
        def forward(self, x: Tensor) -> Tensor:
            hidden = F.relu(self.up(x))
            with torch.autocast("cpu", torch.bfloat16, enabled=self.training):
                return self.down(hidden)  # type: ignore[no-any-return]

    check(CastsLast(F.relu), fused, 0, blocks=1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile reads it
def test_compiled_parts(fused: list[str]) -> None:
    for part in ("function", "up", "down"):
        model = Block(nn.GELU())
        model.get_submodule(part).compile(backend="eager")
        check(model, fused, 0, blocks=int(part == "function"))
    model = Block(nn.GELU())
    model.function = torch.compile(model.function, backend="eager")
    check(model, fused, 0, blocks=1)


def test_threads_do_not_meet(fused: list[str]) -> None:
    model, x = Block(nn.Sequential(nn.GELU(), nn.Identity())), torch.randn(4, 16)
    el.fuse(model)
    expected, wrong = model(x), list[object]()

    def run() -> None:
        for _ in range(50):
            if not torch.equal(model(x), expected):
                wrong.append(x)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(fused) == 201
