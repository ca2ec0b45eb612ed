"""Structured convolutions equal torch's with the same kernel, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import einlinear as el

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": "same", "dilation": 2, "bias": False},
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1, "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
]
SPECS = ["dense", "low_rank(rank=5)", "btt(rank=2)", "monarch(blocks=4)", "kronecker", "dyad"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("kind", ["Conv1d", "Conv2d"])
def test_equal_to_torch(kind: str, geometry: dict[str, Any], spec: str) -> None:
    layer = getattr(el, kind)(16, 24, structure=spec, dtype=torch.float64, **geometry)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    dense = layer.to_dense()
    x = torch.randn(3, 16, *[9, 8][: layer.dimensions], dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), dense(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(layer(x[0]), expected[0])
    upstream = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad((y * upstream).sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad((expected * upstream).sum(), x)[0])
    # gradients of the factors, through the kernel
    weight = layer.dense_weight()
    functional = dense_function(layer, x, weight)
    factors = layer.weight_parameters()
    found = torch.autograd.grad((layer(x) * upstream).sum(), factors)
    torch.testing.assert_close(found, torch.autograd.grad((functional * upstream).sum(), factors))


def dense_function(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    dense = layer.to_dense()
    return torch.func.functional_call(
        dense, {"weight": weight, **({"bias": dense.bias} if dense.bias is not None else {})}, (x,)
    )  # type: ignore[no-any-return]


def test_depthwise_separable_is_a_pattern() -> None:
    layer = el.Conv2d(16, 24, 3, "(c k), c k, o c -> o where c=16", padding=1, bias=False, dtype=torch.float64)
    depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False, dtype=torch.float64)
    pointwise = nn.Conv2d(16, 24, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        depthwise.weight.copy_(layer.A.reshape(16, 1, 3, 3))
        pointwise.weight.copy_(layer.B[..., None, None])
    x = torch.randn(2, 16, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), pointwise(depthwise(x)))


def test_projection_of_a_kernel_of_the_structure_is_exact() -> None:
    dense = el.Conv2d(16, 24, 3, "low_rank(rank=4)", stride=2, padding=1).double().to_dense().eval()
    dense.requires_grad_(False)
    layer = el.Conv2d.from_dense(dense, "low_rank(rank=4)")
    x = torch.randn(2, 16, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x))
    assert (layer.training, layer.A.requires_grad, layer.stride) == (False, False, (2, 2))


def test_conversion_and_back() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.Flatten(), nn.LazyLinear(4))
    x = torch.randn(2, 3, 6, 6)
    model(x)
    before = [type(module) for module in model]
    el.convert(model, "low_rank(rank=3)", layers="4")
    assert type(model[0]) is nn.Conv2d
    report = el.convert(model, {"0": "dense", "2": "btt(rank=2)"}, layers="4", convolutions="*", weights="project")
    assert [c.before for c in report.converted] == ["Conv2d 3 -> 16", "Conv2d 16 -> 32"]
    y = model(x)
    y.sum().backward()
    el.densify(model)
    assert [type(module) for module in model] == [*before[:4], nn.Linear]
    torch.testing.assert_close(model(x), y)


def test_grouped_convolutions_are_skipped() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 3, groups=4), nn.Conv1d(8, 8, 1))
    report = el.convert(model, "low_rank(rank=2)", convolutions="*")
    assert report.skipped == (("0", "has 4 groups, which structured convolutions do not have"),)


def test_learning_rates_are_those_of_a_matrix() -> None:
    model, base = nn.Sequential(el.Conv2d(64, 64, 3, "low_rank(rank=16)")), nn.Sequential(nn.Conv2d(16, 16, 3))
    rates = {g["param_names"][0]: g["lr_mult"] for g in el.param_groups(model, 1.0, base=base)}
    # over 144 and 576 inputs; A sums 576 of them, B 16; both learn at a half
    assert rates == {"0.A": 144 / 576 / 2, "0.B": 144 / 576 * 576 / 16 / 2, "0.bias": 1.0}


def test_mistakes_are_named() -> None:
    layer = el.Conv2d(16, 24, 3, "dense")
    with pytest.raises(
        RuntimeError, match=r"expected .* \(16, height, width\) or \(batch, 16, height, width\), not \(2, 8"
    ):
        layer(torch.randn(2, 8, 9, 9))
    with pytest.raises(RuntimeError, match=r"covers \(3, 3\) positions, more than the input has"):
        layer(torch.randn(1, 16, 2, 9))
    with pytest.raises(ValueError, match=r"has one group, not 8: .* \(c k\), c k, o c -> o"):
        el.Conv2d.from_dense(nn.Conv2d(16, 16, 3, groups=8), "dense")
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Conv1d, not a Conv2d"):
        el.Conv1d.from_dense(nn.Conv2d(16, 16, 3), "dense")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="padding_mode"):
        el.Conv2d(16, 16, 3, "dense", padding_mode="none")
