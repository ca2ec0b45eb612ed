"""Merging, activation and removal of adapters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.adapters.test_adaptation import Block, X, adapted, draw
from torch import nn
from transformers.pytorch_utils import Conv1D

import einlinear as el
from einlinear.adapters import AdaptedLinear


def dense_model(dtype: torch.dtype = torch.float32) -> Any:
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), Conv1D(64, 96)).to(dtype)
    el.adapt(model, "monarch(blocks=4)", scale=0.5)
    draw(model)
    return model


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float32, 1e-5), (torch.float64, 1e-12)]
)
def test_merge_and_unmerge(dtype: torch.dtype, tolerance: float) -> None:
    model, x = dense_model(dtype), X.to(dtype)
    before = {name: p.clone() for name, p in model.named_parameters()}
    after = model(x)
    el.adapters.merge(model)
    assert model[0].merged == ("default",)
    torch.testing.assert_close(model(x), after, rtol=tolerance, atol=tolerance)
    expected = before["0.base_layer.weight"].double() + model[0].adapters["default"].dense_weight().double()
    torch.testing.assert_close(model[0].base_layer.weight, expected.to(dtype), rtol=tolerance / 10, atol=1e-6)
    expected = before["2.base_layer.weight"].double() + model[2].adapters["default"].dense_weight().double().T
    torch.testing.assert_close(model[2].base_layer.weight, expected.to(dtype), rtol=tolerance / 10, atol=1e-6)
    el.adapters.unmerge(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(model(x), after)


def test_merge_twice_and_unmerge_twice_are_refused() -> None:
    model = dense_model()
    with pytest.raises(ValueError, match="no adapter is merged"):
        el.adapters.unmerge(model)
    el.adapters.merge(model)
    for action in (el.adapters.merge, lambda m: el.adapters.activate(m, "default")):
        with pytest.raises(ValueError, match=r"adapters are merged \(default\).*unmerge\(model\) first"):
            action(model)
    with pytest.raises(ValueError, match=r"0: has adapters that are merged \(default\)"):
        el.adapt(model, "btt", name="second")


@pytest.mark.parametrize("layer", ["structured", "quantized"])
def test_structured_layers_refuse_and_nothing_changes(layer: str) -> None:
    model = adapted(layers=["dense", layer])
    before = model(X)
    kind = layer.replace("z", "s")
    with pytest.raises(ValueError, match=rf"{layer}: an adapter cannot be merged into a {kind} layer.*el\.densify"):
        el.adapters.merge(model)
    assert torch.equal(model(X), before)
    assert model.dense.merged == ()


def test_adapters_that_are_not_finite_and_nothing_changes() -> None:
    model = dense_model()
    before = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
    with torch.no_grad():
        model[2].adapters["default"].A.fill_(float("inf"))
    with pytest.raises(ValueError, match="2: the sum of weight and adapters has entries that are not finite"):
        el.adapters.merge(model)
    assert (model[0].merged, model[2].merged) == ((), ())
    assert all(torch.equal(model.get_parameter(name), p) for name, p in before.items())


def test_a_tied_weight_is_not_merged() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(64, 32), "head": nn.Linear(32, 64, bias=False)})
    model["head"].weight = model["embed"].weight
    el.adapt(model, "btt")
    with pytest.raises(ValueError, match="head: an adapter cannot be merged into a weight that is tied to embed"):
        el.adapters.merge(model)


def test_state_dicts_of_merged_models_are_not_confused() -> None:
    model, other = dense_model(), dense_model()
    el.adapters.merge(model)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(X), model(X))
    el.adapters.unmerge(copied)
    with pytest.raises(RuntimeError, match="0 was saved with default merged, but is unmerged"):
        other.load_state_dict(model.state_dict())
    assert "0.unmerged_weight" not in model.state_dict()


def test_several_adapters() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    base = model(X)
    el.adapt(model, "btt", name="first")
    draw(model, "first")
    first = model(X)
    el.adapt(model, "low_rank(rank=2)", "1", name="second")
    draw(model, "second")
    assert (model[0].active, model[1].active) == ((), ("second",))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"1.adapters.second.A", "1.adapters.second.B"}
    second = model(X)
    el.adapters.activate(model, "first")
    assert torch.equal(model(X), first)
    el.adapters.activate(model, ["first", "second"])
    both = model(X)
    assert all(p.requires_grad for n, p in model.named_parameters() if "adapters" in n)
    hidden = model[0](X)
    torch.testing.assert_close(both, model[1].adapters["second"](hidden) + model[1].adapters["first"](hidden)
                               + model[1].base_layer(hidden))  # fmt: skip
    with el.adapters.disable(model):
        assert torch.equal(model(X), base)
    assert torch.equal(model(X), both)
    el.adapters.activate(model, [])
    assert torch.equal(model(X), base)
    with pytest.raises(ValueError, match="no adapter is active"):
        el.adapters.merge(model)
    with pytest.raises(ValueError, match="no adapter named 'third', but first, second"):
        el.adapters.activate(model, "third")
    with pytest.raises(TypeError, match="names must be the name of an adapter, or a list of names, not 3"):
        el.adapters.activate(model, 3)  # type: ignore[arg-type]
    el.adapters.activate(model, "second")
    el.adapters.remove(model, "first")
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(X), second)


def test_disable_restores_after_an_error_and_while_merged() -> None:
    model = dense_model()
    after = model(X)
    with el.adapters.disable(model):
        base = model(X)
    el.adapters.merge(model)
    merged = model(X)
    seen = []

    def fail() -> None:
        with el.adapters.disable(model):
            seen.append(model(X))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(seen[0], base)
    assert torch.equal(model(X), merged)
    el.adapters.unmerge(model)
    assert torch.equal(model(X), after)


def test_remove() -> None:
    model = adapted(name="default")
    el.adapt(model, "btt", name="second")
    with pytest.raises(ValueError, match="no adapter named 'third'"):
        el.adapters.remove(model, ["second", "third"])
    el.adapters.remove(model)
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
    assert {*model.state_dict()} == {*Block().state_dict()}
    model = dense_model()
    el.adapt(model, "btt", name="second")
    el.adapters.merge(model)
    with pytest.raises(ValueError, match=r"adapters are merged \(second\): to remove some of them"):
        el.adapters.remove(model, "default")
    merged = model(X)
    el.adapters.remove(model)
    assert torch.equal(model(X), merged)
