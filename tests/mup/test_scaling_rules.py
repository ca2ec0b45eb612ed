"""Multipliers of weight decay, eps and learning rate: by width, depth and structure, against what they promise."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import einlinear as el
from einlinear.mup.factor_multipliers import gradient_scales
from einlinear_lab.models import ResidualMLP
from einlinear_lab.models.config import ModelConfig, Shape
from einlinear_lab.models.reference import GPTConfig, MLPConfig, ViTConfig

SPECS = ("dense", "btt", "btt(rank=4)", "monarch(blocks=8)", "low_rank(rank=16)", "kronecker", "dyad(blocks=4)")
SIZES = ((256, 256), (64, 256), (256, 64))


def by_name(groups: list[dict[str, Any]], key: str) -> dict[str, float]:
    return {name: group[key] for group in groups for name in group["param_names"]}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon", "soap"])
@pytest.mark.parametrize("spec", [*SPECS, "tt(cores=3, rank=4)"])
def test_independent_decay_shrinks_every_matrix_alike(spec: str, optimizer: str) -> None:
    for width in (64, 256):
        layer = el.Linear(width, 4 * width, spec, bias=False, dtype=torch.float64)
        before = layer.dense_weight().detach().norm()
        base = nn.Linear(32, 128, bias=False)
        for group in el.param_groups(layer, lr=0.01, base=base, optimizer=optimizer, weight_decay=0.1):
            with torch.no_grad():
                for p in group["params"]:
                    p *= 1 - group["lr"] * group["weight_decay"]
        assert layer.dense_weight().detach().norm() / before == pytest.approx(1 - 0.01 * 0.1, rel=1e-6)


def test_coupled_decay_follows_the_learning_rates() -> None:
    layer, base = el.Linear(256, 256, "btt"), nn.Linear(64, 64)
    groups = el.param_groups(layer, lr=0.01, base=base, weight_decay=0.1, decay="coupled")
    assert by_name(groups, "weight_decay") == {"A": 0.1, "B": 0.1, "bias": 0.0}
    # frozen by its rate: any decay is none
    groups = el.param_groups(layer, lr=0.01, base=base, weight_decay=0.1, lr_scale={"A": 0})
    assert by_name(groups, "weight_decay") == {"A": 0.1, "B": pytest.approx(0.1 / 2 / 2), "bias": 0.0}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spec", [*SPECS, "tt(cores=3, rank=4)"])
def test_gradient_scales_are_those_of_random_signals(spec: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = el.Linear(*size, spec, bias=False, dtype=torch.float64)
    x, grad = torch.randn(256, size[0], dtype=torch.float64), torch.randn(256, size[1], dtype=torch.float64)
    squares = [0.0 for _ in layer.structure.factors]
    for _ in range(8):
        layer.reset_parameters()
        for i, g in enumerate(torch.autograd.grad(layer(x), list(layer.factors()), grad)):
            squares[i] += g.square().mean().item() / 8 / len(x)
    assert [math.sqrt(square) for square in squares] == pytest.approx(gradient_scales(layer.structure), rel=0.15)


def gradients(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
    model.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    return {name: p.grad.square().mean().sqrt().item() for name, p in model.named_parameters() if p.grad is not None}


def test_eps_follows_the_gradients_of_wide_models() -> None:
    torch.manual_seed(0)
    batch = torch.randn(256, 48), torch.randint(10, (256,))

    def build(width: int, structure: str = "dense") -> ResidualMLP:
        model = ResidualMLP(48, width, 10, depth=2, structure=structure, input_structure="dense")
        return el.init_(model, zero=())  # type: ignore[return-value]

    base = build(64)
    of_base = gradients(base, batch)
    for structure in ("dense", "btt", "monarch(blocks=8)"):
        model = build(1024, structure)
        eps = by_name(el.param_groups(model, lr=1.0, base=base, eps=1.0), "eps")
        for name, size in gradients(model, batch).items():
            in_base = of_base[name.removesuffix("B") + "A" if name.endswith(".B") else name]
            assert 0.5 < size / in_base / eps[name] < 2, (structure, name)


def test_with_one_eps_for_all_wide_models_hardly_learn() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 48), torch.randint(10, (64,))

    def update(width: int, eps: float, scaled: bool) -> float:
        """Return how much ten steps change the features of the last block."""
        torch.manual_seed(1)
        model = ResidualMLP(48, width, 10, depth=2, structure="low_rank(rank=32)", bias=False)
        el.init_(model, zero="head")
        base = ResidualMLP(48, 64, 10, depth=2, bias=False)
        groups = el.param_groups(model, 3e-3, base=base, eps=eps if scaled else None, weight_decay=0.0)
        optimizer = torch.optim.AdamW(groups, eps=eps)
        features: list[Tensor] = []
        model.blocks.register_forward_hook(lambda module, inputs, output: features.append(output.detach()))
        for _ in range(10):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return (features[-1] - features[0]).square().mean().sqrt().item()

    exact, eps = 1e-12, 1e-6
    assert update(64, eps, scaled=False) == pytest.approx(update(64, exact, scaled=False), rel=0.05)
    wide = update(2048, exact, scaled=False)
    assert update(2048, eps, scaled=True) > 0.8 * wide
    assert update(2048, eps, scaled=False) < 0.6 * wide


def test_the_base_may_be_shallower() -> None:
    model = ResidualMLP(48, 64, 10, depth=12, structure="btt")
    base = ResidualMLP(48, 32, 10, depth=3)
    options: dict[str, Any] = {"lr": 1.0, "base": base, "eps": 1.0}
    same = ResidualMLP(48, 64, 10, depth=3, structure="btt")
    of_same = {key: by_name(el.param_groups(same, **options), key) for key in ("lr_mult", "eps")}
    deep = {key: by_name(el.param_groups(model, **options), key) for key in ("lr_mult", "eps")}
    assert deep["lr_mult"]["blocks.11.fc1.A"] == of_same["lr_mult"]["blocks.2.fc1.A"]
    assert deep["eps"]["blocks.11.fc1.A"] == pytest.approx(of_same["eps"]["blocks.2.fc1.A"] / 4)
    assert deep["eps"]["head.weight"] == of_same["eps"]["head.weight"]
    half = {key: by_name(el.param_groups(model, alpha=0.5, **options), key) for key in ("lr_mult", "eps")}
    for name in ("blocks.11.fc1.A", "blocks.0.norm.weight"):
        assert half["lr_mult"][name] == pytest.approx(deep["lr_mult"][name] / 2)
        assert half["eps"][name] == pytest.approx(deep["eps"][name] * 2)
    assert half["lr_mult"]["input.A"] == deep["lr_mult"]["input.A"]
    # SGD, whose step is the gradient itself
    sgd = {
        alpha: by_name(el.param_groups(model, 1.0, base=base, optimizer="sgd", alpha=alpha), "lr_mult")
        for alpha in (0.5, 1)
    }
    of_same_sgd = by_name(el.param_groups(same, 1.0, base=base, optimizer="sgd"), "lr_mult")["blocks.2.fc1.A"]
    assert sgd[1]["blocks.11.fc1.A"] == pytest.approx(4 * of_same_sgd)
    assert sgd[0.5]["blocks.11.fc1.A"] == pytest.approx(of_same_sgd)


def test_layers_of_the_base_that_differ_stand_for_no_other() -> None:
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    with pytest.raises(
        ValueError, match=r"no '2.weight', and the layers of its depth differ: '0.weight' has shape \[8, 8\]"
    ):
        el.param_groups(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)), 1.0, base=base)


@pytest.mark.parametrize("kind", [MLPConfig, ViTConfig, GPTConfig])
def test_branches_of_deeper_reference_models(kind: type[ModelConfig]) -> None:
    shape = Shape(16, 10, context=16) if kind is GPTConfig else Shape(48, 10, (3, 4, 4))
    config = kind(width=64, depth=12, base_depth=3)
    assert config.branch_multiplier == pytest.approx(1 / 4)
    assert replace(config, alpha=0.5).branch_multiplier == pytest.approx(1 / 2)
    assert replace(config, base_depth=None).branch_multiplier == (0.5 if kind is GPTConfig else 1.0)
    model, base = config.build(shape), config.base(shape)
    multipliers = {module.multiplier for module in model.modules() if hasattr(module, "multiplier")}
    assert multipliers == {config.branch_multiplier}
    assert (len(model.blocks), len(base.blocks)) == (12, 3)
    assert set(by_name(el.param_groups(model, 1.0, base=base, eps=1.0), "eps").values()) >= {1.0, 0.25}
