"""Hidden features of fused blocks that are used elsewhere, and hooks that see them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.fusion.blocks import Block, Uses, assert_equal, attributes, step
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import einlinear as el
from einlinear import ops


@pytest.mark.parametrize("gradients", [True, False])
def test_hidden_features_that_outlive_their_block_keep_their_values(gradients: bool, fused: list[str]) -> None:
    model, x, kept = Uses(F.relu), torch.randn(4, 16), list[Tensor]()
    expected = F.relu(model.up(x))
    el.fuse(model)
    model.use = lambda x, hidden: kept.append(hidden)  # type: ignore[method-assign]
    with torch.set_grad_enabled(gradients):
        model(x)
        x.zero_()
        nn.init.zeros_(model.up.A)
    assert len(fused) == 1
    torch.testing.assert_close(kept[0] + 0, expected)
    assert kept[0].requires_grad is gradients


def test_uses_that_the_trial_had_not(fused: list[str]) -> None:
    model, x, found = Uses(F.relu), torch.randn(4, 16), list[Any]()
    expected = step(model, x)
    el.fuse(model)
    model.use = lambda x, hidden: found.append(hidden.sum())  # type: ignore[method-assign]
    assert_equal(step(model, x), expected)
    assert not fused
    model.use = lambda x, hidden: x.mul_(1)  # type: ignore[method-assign]
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"changed in place before the block ended"):
        model(x)
    # the block is closed: what follows is computed as it is
    del model.use
    assert isinstance(model.up(x), Tensor)
    assert type(model.up(x)) is Tensor
    assert_equal(step(model, x), expected)


def test_layers_that_read_values_get_tensors(fused: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, types = Uses(F.relu), torch.randn(4, 16), list[type]()
    other, original = el.Linear(36, 4, "btt"), ops.linear
    el.fuse(model)
    model.use = lambda x, hidden: other(hidden)  # type: ignore[method-assign]

    def linear(structure: Any, factors: Any, x: Tensor, bias: Any) -> Tensor:
        types.append(type(x))
        return original(structure, factors, x, bias)

    monkeypatch.setattr(ops, "linear", linear)
    model(x)
    # tensors of another type would be left to the reference
    assert set(types) == {Tensor}
    assert not fused


def test_hooks_see_what_they_saw(fused: list[str]) -> None:
    model, x = Block(nn.Sequential(nn.GELU())), torch.randn(5, 16)
    expected = model(x)
    el.fuse(model)

    def checked(register: Callable[[], Any], is_fused: bool = False) -> None:
        fused.clear()
        handle = register()
        y = model(x.requires_grad_())
        torch.testing.assert_close(y, expected)
        y.sum().backward()
        handle.remove()
        assert bool(fused) is is_fused
        model(x)
        assert fused

    seen: list[Any] = []

    def hook(module: nn.Module, *values: Any) -> None:
        seen.append(values[-1])

    for module in (model.up, model.down, model.function, model.function[0]):  # type: ignore[index]
        checked(lambda module=module: module.register_forward_hook(hook))
        checked(lambda module=module: module.register_forward_pre_hook(hook))
        checked(lambda module=module: module.register_full_backward_hook(hook))
        checked(lambda module=module: module.register_full_backward_pre_hook(hook))
    checked(lambda: register_module_forward_hook(hook))
    assert all(type(value) in (Tensor, tuple) for value in seen)
    checked(lambda: model.register_forward_hook(hook), is_fused=True)
    checked(lambda: model.up.A.register_hook(lambda grad: None), is_fused=True)  # type: ignore[operator, union-attr]
    model.function[0].register_forward_hook(lambda *_: None)  # type: ignore[index]
    (block,) = el.fuse(model).blocks
    assert block.runs == "unfused: function.0 has hooks or a forward pass of its own"
    model.down.forward = model.down.forward  # type: ignore[method-assign]
    fused.clear()
    model(x)
    assert not fused


def test_modules_around_a_block_are_hooked_once() -> None:
    model = Block(F.relu)
    before = attributes(model)
    for _ in range(3):
        el.fuse(model)
        assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1
    el.unfuse(model)
    el.unfuse(model)
    assert attributes(model) == before
    handle = model.register_forward_hook(lambda *_: None)
    el.fuse(model)
    el.unfuse(model)
    assert len(model._forward_hooks) == 1
    handle.remove()
