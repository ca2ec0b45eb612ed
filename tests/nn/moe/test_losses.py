"""The losses and loads of mixtures: their definitions, and that nothing of earlier batches is left in them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import einlinear as el


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(el.MoELinear(16, 16, "btt", experts=4), el.MoELinear(16, 16, "dense", experts=8, active=1))
    for layer in model:
        nn.init.normal_(layer.router, std=0.5)
    return model


def test_definition() -> None:
    model = two_layers()
    x = torch.randn(30, 16)
    model(x)
    expected = torch.zeros(())
    for layer, inputs in zip(model, (x, model[0](x)), strict=True):
        logits = inputs @ layer.router.T
        count = layer.experts
        shares = torch.bincount(logits.topk(layer.active).indices.flatten(), minlength=count) / (30 * layer.active)
        expected = expected + count * (logits.softmax(1).mean(0) * shares).sum() / 2
        expected = expected + 0.25 * logits.exp().sum(1).log().square().mean() / 2
    torch.testing.assert_close(el.moe_loss(model, z=0.25), expected)


def test_an_even_load_has_a_balance_of_one() -> None:
    layer = el.MoELinear(16, 16, "btt", experts=4)
    layer(torch.randn(100, 16))
    assert el.moe_loss(layer, z=0).item() == pytest.approx(1)
    assert el.moe_loss(layer, z=1).item() == pytest.approx(1 + math.log(4) ** 2)


def test_the_loss_evens_out_the_load() -> None:
    torch.manual_seed(0)
    layer = el.MoELinear(16, 16, "btt", experts=4, active=1)
    nn.init.normal_(layer.router, std=3)
    x = 0.3 * torch.randn(500, 16) + 1
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    entropies = []
    for _ in range(60):
        layer(x)
        entropies.append(el.moe_loads(layer)[""].entropy)
        optimizer.zero_grad()
        el.moe_loss(layer).backward()
        optimizer.step()
    assert entropies[0] < 0.9
    assert entropies[-1] > 0.98


def test_only_the_last_batch_counts() -> None:
    model = two_layers()
    x, other = torch.randn(30, 16), torch.randn(70, 16) + 2
    model(x)
    before = el.moe_loss(model)
    model(other)
    assert not torch.equal(el.moe_loss(model), before)
    model(x)
    assert torch.equal(el.moe_loss(model), before)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_loads() -> None:
    model = two_layers()
    model(torch.randn(30, 16))
    loads = el.moe_loads(model)
    assert list(loads) == ["0", "1"]
    assert sum(loads["0"].counts) == 60
    assert sum(loads["1"].counts) == 30
    with torch.no_grad():
        model[1].router.zero_()[5] = 100 * model[0].bias.new_ones(16)
    model[1](torch.ones(10, 16))
    load = el.moe_loads(model)["1"]
    assert load.counts == (0, 0, 0, 0, 0, 10, 0, 0)
    assert load.entropy == 0
    assert load.largest == 8


def test_models_without_a_last_batch() -> None:
    with pytest.raises(ValueError, match="no layers with experts"):
        el.moe_loss(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="0 has not run yet"):
        el.moe_loss(two_layers())
