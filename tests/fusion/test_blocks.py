"""`fuse` on blocks of other models: which layers form a block, with which activations and inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.fusion.blocks import Block, check
from torch import Tensor, nn
from torch.nn.utils import parametrize

import einlinear as el
from einlinear import ops


def packed(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate, inplace=True).mul_(up)


@pytest.mark.parametrize(
    ("function", "is_gated"),
    [
        (F.relu, False),
        (nn.ReLU(inplace=True), False),
        (torch.relu_, False),
        (nn.Sequential(nn.GELU(), nn.Dropout(0.0), nn.Identity()), False),
        (lambda h: h, False),
        (lambda g, u: torch.sigmoid(g) * u, True),
        (packed, True),
    ],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_functions(function: Callable[..., Tensor], is_gated: bool, normalize: bool, fused: list[str]) -> None:
    check(Block(function, is_gated=is_gated, normalize=normalize), fused, 1)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(16),
        torch.randn(5, 16),
        torch.randn(2, 16, 3).transpose(1, 2),
        torch.randn(9, 16)[::2],
        torch.randn(1, 16).expand(4, 16),
    ],
)
def test_inputs(x: Tensor, fused: list[str]) -> None:
    check(Block(F.silu), fused, 1, x=x)
    check(Block(F.silu, dtype=torch.float64), fused, 1, x=x.double())


def test_empty_and_nested_inputs(fused: list[str]) -> None:
    model = Block(F.silu)
    el.fuse(model)
    assert model(torch.randn(0, 16)).shape == (0, 16)
    parts = [torch.randn(2, 16), torch.randn(3, 16)]
    nested = model(torch.nested.nested_tensor(parts, layout=torch.jagged))
    torch.testing.assert_close(nested.values(), model(torch.cat(parts)), rtol=1e-5, atol=1e-5)
    assert len(fused) == 1


def test_wrong_inputs_raise_as_before() -> None:
    model = Block(F.silu)
    messages = []
    for _ in range(2):
        for x in (torch.randn(3, 15), torch.randn(3, 16).double(), torch.randn(3, 16, device="meta")):
            with pytest.raises(RuntimeError) as error:
                model(x)
            messages.append(str(error.value))
        el.fuse(model)
    assert messages[:3] == messages[3:]


def test_sequences(fused: list[str]) -> None:
    """Layers of one container are blocks in pairs; a layer can be the first of one block only."""
    layers = [el.Linear(16, 16, "btt") for _ in range(5)]
    model = nn.Sequential(*[module for layer in layers for module in (layer, nn.Tanh())])
    report = check(model, fused, 2)
    assert [(b.module, b.up, b.down) for b in report.blocks] == [("", "0", "2"), ("", "4", "6")]


def test_layers_that_are_shared(fused: list[str]) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Block(F.relu)
            self.second = Block(torch.tanh)
            self.second.up = self.first.up

        def forward(self, x: Tensor) -> Tensor:
            return self.first(self.second(self.first(x)))  # type: ignore[no-any-return]

    report = check(Shared(), fused, 3, blocks=2)
    assert [(b.up, b.down) for b in report.blocks] == [("first.up", "first.down"), ("first.up", "second.down")]


def test_blocks_in_modules_that_are_never_called(fused: list[str]) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(
                nn.ModuleDict({"up": el.Linear(16, 32, "btt"), "down": el.Linear(32, 16, "btt")}) for _ in range(3)
            )

        def forward(self, x: Tensor) -> Tensor:
            return sum(e["down"](F.relu(e["up"](x))) for e in self.experts)  # type: ignore[index, operator, return-value]

    assert {block.module for block in check(Experts(), fused, 3).blocks} == {""}


def test_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report tells how blocks run that are large, and layers of small calls are not asked to wait."""
    model = nn.Sequential(el.Linear(1024, 4096, "low_rank(rank=128)"), nn.GELU(), el.Linear(4096, 1024, "btt"))
    (block,) = el.fuse(model).blocks
    if ops.reason_unsupported("cpu", model[0].structure, torch.float32, torch.device("cpu")) is None:  # type: ignore[arg-type]
        with el.backend("reference"):
            assert "unfused: the backend 'reference' is forced" in str(el.fuse(model))
        assert block.reason is None
        reason = "its factors have 720,896 entries, but no more than"
        assert block.runs == "fused" or block.runs.startswith(f"fused in inference, unfused in training: {reason}")
    calls: list[Any] = []
    monkeypatch.setattr(ops, "feed_forward", lambda *arguments: calls.append(arguments))
    model(torch.randn(1, 1024))
    assert not calls


def test_feed_forward_modules_fuse_themselves(fused: list[str]) -> None:
    model = nn.Sequential(el.FeedForward(16, 32, "btt"), el.FeedForward(16, 32, "btt", activation=F.mish))
    report = el.fuse(model)
    assert not report.blocks
    assert [name for name, _ in report.skipped] == ["1.up"]
    assert str(report).startswith("fused by themselves: 0\nskipped 1.up")
    # a function of which the module does not know what it computes
    model = nn.Sequential(el.FeedForward(16, 32, "btt", activation=lambda x: torch.relu(x).square(), gated=True))
    assert check(model, fused, 1).blocks[0].activation == "relu_squared"


def test_modules_with_further_arguments(fused: list[str]) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(F.relu)
            self.up, self.down = self.block.up, self.block.down
            del self.block

        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            return self.down(F.relu(self.up(x))) + residual  # type: ignore[no-any-return]

    model, x = Residual(), torch.randn(3, 16)
    expected = model(x, x)
    assert len(el.fuse(model).blocks) == 1
    torch.testing.assert_close(model(x, x), expected)
    assert len(fused) == 1


def test_parametrized_layers(fused: list[str]) -> None:
    block = Block(F.relu)
    parametrize.register_parametrization(block.up, "A", nn.Tanh())
    check(block, fused, 1)
