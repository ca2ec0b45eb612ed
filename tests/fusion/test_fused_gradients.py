"""Gradients of fused blocks: dropout, custom functions, gradient modes, second derivatives."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from tests.fusion.blocks import Block, assert_equal, check, step
from torch import Tensor, nn

import einlinear as el


def test_dropout_in_training(fused: list[str]) -> None:
    model, x = Block(nn.Sequential(nn.GELU(), nn.Dropout(0.5))), torch.randn(5, 16)

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        return step(model, x)

    expected = run()
    assert len(el.fuse(model).blocks) == 1
    assert model.training
    assert_equal(run(), expected, 0)
    assert not fused
    step(model.eval(), x)
    assert len(fused) == 1


def test_gradients_of_a_custom_function(fused: list[str]) -> None:
    class Through(torch.autograd.Function):
        """relu(x), with the gradient of x."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return F.relu(x)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0]

    model, x = Block(Through.apply), torch.randn(5, 16)
    check(model, fused, 0, blocks=1, x=x)
    with torch.no_grad():
        model(x)
    assert fused == ["relu"]


def test_gradient_modes(fused: list[str]) -> None:
    def detached(h: Tensor) -> Tensor:
        with torch.no_grad():
            return F.relu(h)

    check(Block(detached), fused, 0, blocks=1)

    class FrozenFirst(Block):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                hidden = F.relu(self.up(x))
            return self.down(hidden)  # type: ignore[no-any-return]

    check(FrozenFirst(F.relu), fused, 0, blocks=1)
    model, x = Block(F.relu), torch.randn(5, 16)
    expected = model(x)
    el.fuse(model)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            torch.testing.assert_close(model(x), expected)
            torch.testing.assert_close(model(x + 0), expected)
    assert len(fused) == 6
    with torch.inference_mode():
        assert len(el.fuse(model).blocks) == 1
    model.requires_grad_(False)
    model.down.A.requires_grad_()  # type: ignore[union-attr]
    check(model, fused, 1)


def test_second_derivatives(fused: list[str]) -> None:
    model, x = Block(torch.tanh), torch.randn(5, 16, requires_grad=True)

    def penalty() -> Tensor:
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), model.up.A)[0]  # type: ignore[arg-type]

    expected = penalty()
    el.fuse(model)
    torch.testing.assert_close(penalty(), expected, rtol=1e-4, atol=1e-4)
    assert fused == ["tanh"]
