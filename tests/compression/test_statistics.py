"""Calibration data that say little or nothing of some layer are no errors; those that are broken name the layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import einlinear as el


def net(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(24, 32, bias), nn.ReLU(), nn.Linear(32, 32, bias), nn.ReLU(), nn.Linear(32, 24, bias)
    )


def dead(bias: bool) -> nn.Sequential:
    """Nothing passes the first activation."""
    model = net(bias)
    with torch.no_grad():
        if bias:
            model[0].bias -= 100
        else:
            model[0].weight.zero_()
    return model


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("damping", [1e-2, 0.0])
def test_inputs_that_are_always_zero(bias: bool, sequential: bool, damping: float) -> None:
    model = dead(bias)
    x = torch.randn(100, 24)
    right, weight = model(x).detach(), model[2].weight.detach().clone()
    report = el.compress(model, 0.6, ["low_rank", "monarch(blocks=4)"], [x], sequential=sequential, damping=damping)
    assert report.params <= 0.6 * report.params_before
    torch.testing.assert_close(model(x), right, atol=1e-4, rtol=1e-3)
    layer = model[2]
    if isinstance(layer, el.Linear):  # its weight is approximated, not thrown away
        left = (layer.dense_weight().detach() - weight).square().sum() / weight.square().sum()
        assert float(left) < 0.7


class Experts(nn.Module):
    """Tokens go to one of three layers; no token goes to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 24)
        self.experts = nn.ModuleList(nn.Linear(24, 24) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        which = (x[:, 0] > 0).long()
        for number, expert in enumerate(self.experts):
            mine = which == number
            y = y.index_put((mine,), expert(y[mine]))  # called without tokens as well
        return y


def test_a_layer_that_sees_no_token() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 24)
    report = el.compress(Experts(), 0.6, ["low_rank"], [x[:100], x[100:]])
    assert dict(report.skipped) == {"experts.2": "is never called on the calibration data"}
    assert {layer.name for layer in report.layers} == {"first", "experts.0", "experts.1"}
    # in the first batches no token goes to the second expert, in a later one some do
    batches = [*([-x.abs()] * 3), x]
    report = el.compress(Experts(), 0.6, ["low_rank"], batches)
    assert {layer.name for layer in report.layers} == {"first", "experts.0", "experts.1"}


def test_empty_batches() -> None:
    x = torch.randn(100, 24)
    models = [net() for _ in range(3)]
    for model, batches in zip(models, ([x], [x[:0], x], [x, x[:0]]), strict=True):
        report = el.compress(model, 0.6, ["low_rank"], batches)
        assert {100 / 24, 100 / 32} >= {layer.tokens_per_input for layer in report.layers} - {None}
        torch.testing.assert_close(model(x), models[0](x))
    with pytest.raises(ValueError, match="to compress: 0 is never called on the calibration data"):
        el.compress(net(), 0.6, ["low_rank"], [x[:0]])


@pytest.mark.parametrize("structures", [["low_rank(rank=64)"], ["btt(rank=2)"], ["monarch(blocks=4)"]])
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("sequential", [True, False])
def test_without_damping(structures: list[str], mean: float, sequential: bool) -> None:
    torch.manual_seed(0)
    x = (torch.randn(1024, 4) + mean).repeat(1, 64)  # four features, each 64 times
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    right = model(x).detach()
    report = el.compress(model, 0.8, structures, [x], damping=0.0, sequential=sequential)
    assert report.params <= 0.8 * report.params_before
    found = model(x).detach()
    assert float((found - right).square().sum() / (right - right.mean(0)).square().sum()) < 0.1
    assert all(layer.error > -1e-3 for layer in report.layers)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(1, 24),
        torch.randn(1, 24).expand(50, -1),
        torch.randn(5, 24),
        torch.cat([torch.randn(50, 23), torch.zeros(50, 1)], 1),
        1e4 * torch.ones(50, 24) + torch.randn(50, 1),
    ],
    ids=["one token", "constant", "fewer tokens than features", "a feature that is zero", "one direction"],
)
@pytest.mark.parametrize("damping", [1e-2, 0.0])
def test_few_directions(x: Tensor, damping: float) -> None:
    for bias in (True, False):
        model = net(bias)
        right = model(x).detach()
        report = el.compress(model, 0.7, ["low_rank"], [x], damping=damping)
        assert report.params <= 0.7 * report.params_before
        found = model(x).detach()
        assert float((found - right).norm()) <= 0.6 * float(right.norm())
        assert all(layer.error < 2 for layer in report.layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_lengths(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    batches: list[Any] = [torch.randn(3, tokens, 24, dtype=dtype) for tokens in (5, 17, 1)]
    report = el.compress(model, 0.6, ["low_rank"], batches)
    assert {3 * 23 / 24, 3 * 23 / 32} >= {layer.tokens_per_input for layer in report.layers} - {None}
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_integer_inputs() -> None:
    model = nn.Sequential(nn.Embedding(50, 24), *net())
    report = el.compress(model, 0.6, ["low_rank"], [torch.randint(50, (4, 30)), torch.randint(50, (2, 7))])
    assert len(report.layers) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_numbers_name_the_layer(value: float) -> None:
    x = torch.randn(100, 24)
    broken = x.clone()
    broken[3, 5] = value
    with pytest.raises(ValueError, match=r"^0, batch 1 of the calibration data: its inputs have values that"):
        el.compress(net(), 0.6, ["low_rank"], [x, broken])
    model = net()
    with torch.no_grad():
        model[2].weight[0, 0] = value
    with pytest.raises(ValueError, match="the weight of 2 has values that are NaN or infinite"):
        el.compress(model, 0.6, ["low_rank"])
    with pytest.raises(ValueError, match=r"^0: its inputs are too large: their squares overflow float32"):
        el.compress(net(), 0.6, ["low_rank"], [1e25 * x])


@pytest.mark.parametrize("damping", [-0.1, float("nan"), float("inf")])
def test_damping_is_a_fraction(damping: float) -> None:
    with pytest.raises(ValueError, match="damping is a fraction of the inputs' variance, at least 0"):
        el.compress(net(), 0.6, ["low_rank"], [torch.randn(100, 24)], damping=damping)


def test_failures_of_linear_algebra_name_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr("einlinear.compression.candidates.Spectrum.of", failing)
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^0 cannot be fitted to its inputs: did not converge; .* damping than 0\.01"):
        el.compress(model, 0.6, ["low_rank"], [torch.randn(100, 24)])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
