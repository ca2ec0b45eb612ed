"""Subclasses of nn.Linear: those that compute the same are converted, and others are left alone for a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import FalconConfig, FalconForCausalLM, PhimoeConfig
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

import einlinear as el
from einlinear.conversion.eligibility import difference_to_linear


class Cast(nn.Linear):
    """Computes in the dtype of its input, as some layers of timm do."""

    def __init__(self, in_features: int, out_features: int, gain: float = 1.0) -> None:
        super().__init__(in_features, out_features)
        nn.init.xavier_uniform_(self.weight, gain)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (self.in_features**-0.5)


class Dropped(nn.Linear):
    """Differs in training alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


class Counting(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Called(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class Adapted(nn.Linear):
    """LoRA: the same function, as long as B is zero."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.lora_a = nn.Parameter(torch.randn(2, in_features))
        self.lora_b = nn.Parameter(torch.zeros(out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_a.T @ self.lora_b.T


class Masked(nn.Linear):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("mask", torch.ones(out_features, in_features))


class Gated(nn.Linear):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x if gate is None else x * gate)


class Renamed(nn.Linear):
    pass


SAME = (Cast, FalconLinear, Renamed, NonDynamicallyQuantizableLinear)
OTHER: dict[type[nn.Linear], str] = {
    Scaled: "its forward pass computes something else",
    Dropped: "its forward pass computes something else",
    Called: "its forward pass computes something else",
    Counting: "its forward pass changes the layer",
    Adapted: "it has lora_a, lora_b beside weight and bias",
    Masked: "it has mask beside weight and bias",
    Gated: "its forward pass takes more than one input",
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("cls", SAME)
def test_subclasses_with_the_same_function_are_converted(cls: Any, device: str) -> None:
    with torch.device(device):
        model = nn.Sequential(cls(16, 24)).double().eval()
    el.convert(model, "low_rank(rank=16)", weights="init" if device == "meta" else "project")
    assert type(model[0]) is el.Linear
    if device == "cpu":
        el.densify(model)
        # one that has a constructor of its own could not be made again
        assert type(model[0]) is (cls if cls in (FalconLinear, Renamed) else nn.Linear)
        assert (model[0].weight.dtype, model[0].training) == (torch.float64, False)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("cls", OTHER)
def test_other_subclasses_are_skipped(cls: Any, device: str) -> None:
    with torch.device(device):
        model = nn.Sequential(cls(16, 24), nn.Linear(24, 16))
    if device == "cpu":
        nn.init.zeros_(model[0].weight)  # its own weight would tell nothing
    report = el.convert(model, "btt")
    assert [c.name for c in report.converted] == ["1"]
    name = cls.__name__
    reason = f"is a {name}, and no plain nn.Linear: {OTHER[cls]}. classes=[{name}] converts it all the same"
    assert report.skipped == (("0", reason),)
    assert type(model[0]) is cls
    el.convert(model, "btt", classes=cls)
    assert type(model[0]) is el.Linear


def test_a_router_is_no_linear_layer() -> None:
    config = PhimoeConfig(hidden_size=16, num_local_experts=4)
    model = nn.Sequential(PhimoeTopKRouter(config))
    with pytest.raises(ValueError, match=r"PhimoeTopKRouter, and no plain nn\.Linear: its forward pass"):
        el.convert(model, "low_rank(rank=1)")


def test_the_random_state_is_unchanged() -> None:
    layer, state = Dropped(16, 16), torch.get_rng_state()
    assert difference_to_linear(layer)
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.training


def test_attributes_count_as_the_class_does() -> None:
    class Switched(nn.Linear):
        def __init__(self, scale: float) -> None:
            super().__init__(16, 16)
            self.scale = scale

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * super().forward(x)

    model = nn.Sequential(Switched(1.0), Switched(2.0), Switched(1.0))
    assert [name for name, _ in el.convert(model, "btt").skipped] == ["1"]


def test_classes_must_be_linear() -> None:
    for classes in (nn.Conv2d, [nn.Module], "Cast"):
        with pytest.raises(TypeError, match=r"classes must be a subclass of torch\.nn\.Linear, or a list of such"):
            el.convert(nn.Sequential(nn.Linear(16, 16)), "btt", classes=classes)


def test_falcon() -> None:
    config = FalconConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, bias=True, bos_token_id=0
    )
    model = FalconForCausalLM(config).eval()
    tokens = torch.randint(1, 32, (1, 5))
    with torch.no_grad():
        before = model(tokens).logits
        report = el.convert(model, "monarch(blocks=1)", layers="transformer.h.*", weights="project")
        assert len(report.converted) == 4
        assert report.skipped == ()
        torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-5)
        el.densify(model)
        assert type(model.transformer.h[0].mlp.dense_h_to_4h) is FalconLinear
        torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-5)
