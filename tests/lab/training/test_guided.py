"""Guides: the function stays the same, and their costs, roles and learning rates are those of a dense layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

import einlinear as el
from einlinear_lab.models.macs import macs_per_token
from einlinear_lab.training.guided import Guided, guide, set_share, unguide


def build(structure: str = "btt(rank=2)", normalize: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [el.Linear(12, 20, structure, normalize=normalize, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        for p in (*layers[0].parameters(), *layers[1].parameters()):
            p.add_(torch.randn_like(p))
    return nn.Sequential(layers[0], nn.Linear(20, 12, dtype=torch.float64), layers[1])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("structure", ["btt(rank=2)", "block_diagonal(blocks=4)", "dyad", "i, o i -> o"])
def test_a_guide_changes_nothing_whatever_its_share(structure: str, normalize: bool) -> None:
    model, x = build(structure, normalize), torch.randn(3, 12, dtype=torch.float64)
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    guide(model)
    for share in (1, 0.7, 0):
        set_share(model, share)
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert {*model.state_dict()} - {*before} == {"0.guide", "2.guide"}
    for name in ("0.guide", "2.guide"):
        nn.init.zeros_(model.get_parameter(name))  # they are not the factors themselves
    unguide(model)
    assert {name: type(module) for name, module in model.named_children()} == {
        "0": el.Linear,
        "1": nn.Linear,
        "2": el.Linear,
    }
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), expected)
    guide(model)  # again


def test_the_share_is_that_of_the_guide() -> None:
    layer, x = build()[0], torch.randn(3, 12, dtype=torch.float64)
    assert isinstance(layer, el.Linear)
    layer(x).sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad()
    weight, bias = layer.dense_weight(), layer.bias
    guide(layer)
    other = torch.randn_like(weight)
    layer.load_state_dict({**layer.state_dict(), "guide": other})
    set_share(layer, 0.25)
    expected = 0.75 * weight + 0.25 * other
    for found in (layer, layer.to_dense(), copy.deepcopy(layer)):
        torch.testing.assert_close(found(x), x @ expected.T + bias)
    torch.testing.assert_close(layer.weight, expected)
    layer(x).sum().backward()
    gradients = {name: g if name == "bias" or g is None else 0.75 * g for name, g in gradients.items()}
    gradients["guide"] = 0.25 * x.sum(0).expand(20, 12)
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], msg=name)


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_precision(dtype: torch.dtype, share: torch.dtype) -> None:
    """The output has the dtype of the layer, and so has the guide; the share is as exact as a step needs."""
    layer = el.Linear(16, 16, "btt", dtype=dtype)
    guide(layer)
    assert (layer(torch.randn(2, 16, dtype=dtype)).dtype, layer.get_parameter("guide").dtype) == (dtype, dtype)
    assert layer.get_buffer("share").dtype == share
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.float()(torch.randn(2, 16)).dtype == torch.bfloat16


def test_it_is_counted_and_learns_as_a_dense_matrix() -> None:
    model, base = nn.Sequential(el.Linear(64, 256, "btt"), nn.Linear(256, 16)), nn.Sequential()
    base.extend([nn.Linear(16, 64), nn.Linear(64, 16)])
    shapes, macs = el.base_shapes(model), macs_per_token(model)
    guide(model)
    assert el.base_shapes(model) == shapes
    assert macs_per_token(model) == macs + 64 * 256
    with el.backend("reference"), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 64))
    assert counter.get_total_flops() == 2 * macs_per_token(model)
    for optimizer, of_dense, matrices in (("adamw", 0.25, None), ("sgd", 1.0, None), ("muon", 1.0, (256, 64))):
        groups = el.param_groups(model, 1e-2, base=base, optimizer=optimizer, weight_decay=0.1)
        (own,) = (group for group in groups if "0.guide" in group["param_names"])
        assert (own["lr_mult"], own["weight_decay"]) == (of_dense, pytest.approx(0.1 / of_dense))
        assert matrices is None or own["matrix_view"][1:] == matrices


def test_initialised_anew_it_is_the_same_function() -> None:
    model, x = build(), torch.randn(3, 12, dtype=torch.float64)
    guide(model)
    el.init_(model, zero="2")
    assert not model[2](x).any()
    found = model(x), model[0](x)
    assert found[1].any()
    unguide(model)
    torch.testing.assert_close((model(x), model[0](x)), found)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_another_share_is_not_compiled_anew() -> None:
    torch._dynamo.reset()
    layer, x, counter = el.Linear(16, 24, "btt"), torch.randn(5, 16), CompileCounter()
    guide(layer)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    outputs = []
    for share in (1.0, 0.7, 0.2):
        set_share(layer, share)
        with torch.no_grad():
            layer.get_parameter("guide").add_(0.1)
        outputs.append(compiled(x))
        torch.testing.assert_close(outputs[-1], layer(x))
    assert counter.frame_count == 1
    assert len({float(y.detach().sum()) for y in outputs}) == 3


def test_what_is_shared_frozen_or_hooked_stays_so() -> None:
    first, second, frozen = (el.Linear(16, 16, "btt", bias=i > 0) for i in range(3))
    second.A, second.B = first.A, first.B
    frozen.requires_grad_(False)
    calls: list[int] = []
    frozen.register_forward_hook(lambda *_: calls.append(1))
    model = nn.Sequential(first, second, frozen, el.Linear(16, 16, "dense"))
    before = len([*model.parameters()])
    guide(model)
    assert len([*model.parameters()]) == before + 2
    assert first.get_parameter("guide") is second.get_parameter("guide")
    assert not any(p.requires_grad for p in frozen.parameters())
    assert type(model[3]) is el.Linear
    model(torch.randn(2, 16))
    assert calls == [1]


def test_what_cannot_have_a_guide_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no structured layer in the model"):
        guide(nn.Sequential(nn.Linear(4, 4)))
    model = nn.Sequential(el.Linear(4, 4, "btt"), el.MoELinear(4, 4, "btt", experts=2))
    with pytest.raises(ValueError, match=r"^1 is a MoELinear: guides are for layers"):
        guide(model)
    assert type(model[0]) is el.Linear
    guide(model[0])
    assert isinstance(model[0], Guided)
    with pytest.raises(ValueError, match="the model is a Guided"):
        guide(model[0])
