"""Blocks and models to fuse, and comparisons of what they compute, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tests.zoo.kinds import KINDS, inputs_of, make
from torch import Tensor, nn

import einlinear as el
from einlinear.fusion import FusionReport


def converted(name: str, spec: str = "btt(rank=2)", dtype: torch.dtype | None = None) -> tuple[nn.Module, Any]:
    """A structured model, no parameter of which is zero, and inputs."""
    model, inputs = make(KINDS[name]), inputs_of(KINDS[name])
    el.convert(model, spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    if dtype is not None:
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return model.to(dtype), inputs


class Block(nn.Module):
    """A block with any function of up and gate."""

    def __init__(self, function: Callable[..., Tensor], *, is_gated: bool = False, **options: Any) -> None:
        super().__init__()
        self.up, self.down = (el.Linear(*size, "btt(rank=2)", **options) for size in ((16, 36), (36, 16)))
        self.gate = el.Linear(16, 36, "low_rank(rank=4)", bias=False) if is_gated else None
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        hidden = self.function(hidden) if self.gate is None else self.function(self.gate(x), hidden)
        y: Tensor = self.down(hidden)
        return y


class Uses(Block):
    """A block that is fused, in which other calls than the trial do something else as well."""

    use: Callable[[Tensor, Tensor], object] = staticmethod(lambda x, hidden: None)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.function(self.up(x))
        self.use(x, hidden)
        return self.down(hidden)  # type: ignore[no-any-return]


def check(
    model: nn.Module, fused: list[str], calls: int, blocks: int | None = None, x: Tensor | None = None
) -> FusionReport:
    """Fuse a model, and compare a step and an output without gradients."""
    x = torch.randn(3, 7, 16) if x is None else x
    expected = step(model, x)
    report = el.fuse(model)
    assert len(report.blocks) == (calls if blocks is None else blocks)
    fused.clear()
    assert_equal(step(model, x), expected)
    assert len(fused) == calls
    return report


def step(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The output, and the gradients of all parameters and of the input."""
    model.zero_grad()
    x = None if isinstance(inputs, dict) else inputs.detach().requires_grad_()
    output = model(**inputs) if x is None else model(x)
    values = list(output.values()) if isinstance(output, dict) else [output]
    logits = next(value for value in values if isinstance(value, Tensor) and value.dim())
    generator = torch.Generator().manual_seed(3)
    (logits * torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits.dtype)).sum().backward()
    tensors = [*model.parameters(), *([] if x is None else [x])]
    return [logits.detach(), *(torch.zeros(()) if t.grad is None else t.grad.clone() for t in tensors)]


def assert_equal(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1, float(b.abs().max())))


def attributes(model: nn.Module) -> list[dict[str, Any]]:
    """All attributes of all modules."""
    return [{k: {**v} if isinstance(v, dict) else v for k, v in vars(m).items()} for m in model.modules()]
