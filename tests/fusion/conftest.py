"""Fixtures of the tests of `fuse`."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from einlinear import ops


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The activations of all blocks that run fused, in order; blocks of any size do."""
    activations: list[str] = []
    original = ops.feed_forward

    def feed_forward(x: Tensor, up: Any, down: Any, gate: Any, activation: str) -> Tensor:
        activations.append(f"{activation}, gated" if gate else activation)
        return original(x, up, down, gate, activation)

    monkeypatch.setattr(ops, "feed_forward", feed_forward)
    monkeypatch.setattr(ops, "reason_not_to_fuse", lambda *_, **__: None)
    return activations
