"""Layers that `fuse` leaves as they are, and the reasons in its report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.fusion.blocks import Block, check
from torch import Tensor, nn

import einlinear as el


class TwoReaders(Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.up(x))
        return self.down(hidden) + self.down(hidden)  # type: ignore[no-any-return]


class Keeps(Block):
    kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = F.relu(self.up(x))
        return self.down(self.kept)  # type: ignore[no-any-return]


class Overwrites(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        hidden = self.function(self.up(x))
        if not torch.is_grad_enabled():
            x.mul_(0)
        return self.down(hidden)  # type: ignore[no-any-return]


class OtherInput(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x + 0)) * self.up(x))  # type: ignore[misc, no-any-return]


class Chunks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_and_up, self.down = el.Linear(16, 64, "btt"), el.Linear(32, 16, "btt")

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_and_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)  # type: ignore[no-any-return]


class Doubled(el.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def with_layer(layer: Any, name: str = "up") -> Block:
    block = Block(F.relu)
    setattr(block, name, layer)
    return block


def hooked() -> Block:
    block = Block(F.relu)
    block.up.register_forward_hook(lambda module, args, output: output + 1)
    return block


UNFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "unknown activation": (lambda: Block(F.mish), "up", "its output is used by mish, which fused blocks do not have"),
    "another function": (
        lambda: Block(lambda h: F.relu(h) * 2),
        "up",
        "no activation that fused blocks have lies between its output and the next layer",
    ),
    "norm": (lambda: Block(nn.LayerNorm(36)), "up", "its output is used by layer_norm, which fused blocks do not have"),
    "two readers": (lambda: TwoReaders(F.relu), "up", "its output is read by more than one layer"),
    "kept": (lambda: Keeps(F.relu), "up", "its hidden features are kept after the model has run"),
    "overwritten": (lambda: Overwrites(lambda h: h), "up", "its input is changed in place before the block ends"),
    "other input": (
        lambda: OtherInput(F.silu, is_gated=True),
        "up",
        "its output is multiplied by that of a layer with another input",
    ),
    "chunks": (Chunks, "gate_and_up", "its output is used by chunk, which fused blocks do not have"),
    "dense": (lambda: with_layer(nn.Linear(16, 36)), "up", "is dense: convert it first"),
    "dense reader": (
        lambda: with_layer(nn.Linear(36, 16), "down"),
        "up",
        "down, which reads its output, is dense: convert it first",
    ),
    "mixture": (lambda: with_layer(el.MoELinear(16, 36, "btt", experts=2)), "up", "is a mixture of experts"),
    "subclass": (
        lambda: with_layer(Doubled(16, 36, "btt")),
        "up",
        "has hooks or a forward pass of its own",
    ),
    "subclass that reads": (
        lambda: with_layer(Doubled(36, 16, "btt"), "down"),
        "up",
        "the layer that reads its output has hooks or a forward pass of its own",
    ),
    "hooks": (hooked, "up", "has hooks or a forward pass of its own"),
}


@pytest.mark.parametrize("name", UNFUSED)
def test_layers_that_are_not_fused(name: str, fused: list[str]) -> None:
    build, layer, reason = UNFUSED[name]
    model = build()
    report = check(model, fused, 0)
    assert dict(report.skipped)[layer] == reason
    assert f"skipped {layer}: {reason}" in str(report)
    assert "There is no feed-forward block" in str(report)


def test_layers_without_inputs(fused: list[str]) -> None:
    class Convolutional(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.conv1d(x, torch.ones(2, 3, 1)).mean(1))

    report = el.fuse(Convolutional(F.relu))
    assert len(report.skipped) == 1
    assert report.skipped[0][1].startswith("could not be tried: the model, run on random rows, raised RuntimeError: ")
    assert report.skipped[0][1].endswith(". Give batches")
    assert el.fuse(Convolutional(F.relu), []).skipped == (("up", "is not called on these batches"),)
    assert len(el.fuse(Convolutional(F.relu), [torch.randn(4, 3, 16), (torch.randn(1, 3, 16),)]).blocks) == 1
