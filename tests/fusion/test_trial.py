"""The trial run with which `fuse` finds blocks: where it can be called, and that it leaves no trace."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.fusion.blocks import Block, attributes
from torch import Tensor, nn

import einlinear as el
from einlinear import ops


def test_where_it_cannot_be_called() -> None:
    model = Block(F.relu)
    for batches in (torch.randn(4, 16), {"x": torch.randn(4, 16)}, 3):
        with pytest.raises(TypeError, match=r"batches must be an iterable of batches, not a .*: for .* give \[batch\]"):
            el.fuse(model, batches)  # type: ignore[arg-type]
    with torch.autocast("cpu"), pytest.raises(RuntimeError, match="call it outside of autocast"):
        el.fuse(model)
    el.fuse(model)
    before = attributes(model)
    with pytest.raises(TypeError, match="cannot be called with this batch"):
        el.fuse(model, [{"y": torch.randn(4, 16)}])
    with pytest.raises(RuntimeError):
        el.fuse(model, [torch.randn(4, 15)])
    # unchanged, and still fused
    assert attributes(model) == before


def test_a_trial_leaves_no_trace(fused: list[str]) -> None:
    class Mode(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            assert not torch.is_grad_enabled()
            return F.dropout(torch.relu(x), 0.5, self.training) + 0 * torch.rand(())

    model = Block(Mode())
    model.up.eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    report = el.fuse(model)
    assert "rand" not in str(report)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not fused


def test_a_trial_keeps_no_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*[Block(F.relu) for _ in range(20)])
    results, alive, original = list[Any](), list[int](), ops.linear

    def linear(*arguments: Any) -> Tensor:
        alive.append(sum(result() is not None for result in results))
        y = original(*arguments)
        results.append(weakref.ref(y))
        return y

    monkeypatch.setattr(ops, "linear", linear)
    assert len(el.fuse(model, [torch.randn(4, 16)]).blocks) == 20
    assert len(alive) == 40
    assert max(alive) <= 3
