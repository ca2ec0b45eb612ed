"""Feed-forward networks and attention of the reference models: fused if their layers are plain and structured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import einlinear as el
from einlinear import ops
from einlinear.ops import shared_input
from einlinear_lab.models import MLPConfig, ResidualMLP
from einlinear_lab.models.blocks import Attention, DenseLinear, Layers, ResidualFeedForward
from einlinear_lab.training.guided import guide, unguide

SPECS = ("btt", "btt(rank=2)", "monarch(blocks=4)", "low_rank(rank=5)", "dyad(blocks=2)")
SPECS += ("(g a), g r a, o g r -> o where g=2, r=3",)


def network(
    width: int, structure: str, multiplier: float = 1.0, bias: bool = True, **options: Any
) -> ResidualFeedForward:
    torch.manual_seed(0)
    found = Layers(MLPConfig(width=width, structure=structure, **options), bias=bias).feed_forward()
    assert isinstance(found, ResidualFeedForward)
    found.multiplier = multiplier
    with torch.no_grad():
        for p in found.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return found


def by_layers(network: ResidualFeedForward, x: Tensor) -> Tensor:
    """What a network computes, written out."""
    return x + network.multiplier * network.fc2(F.gelu(network.fc1(network.norm(x))))


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[ops.Weights]:
    """The weights `up` of all calls of `ops.feed_forward`."""
    calls: list[ops.Weights] = []
    feed_forward = ops.feed_forward

    def watched(x: Tensor, up: ops.Weights, *rest: Any, **options: Any) -> Tensor:
        calls.append(up)
        return feed_forward(x, up, *rest, **options)

    monkeypatch.setattr(ops, "feed_forward", watched)
    return calls


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS)
def test_it_computes_what_its_layers_do(spec: str, dtype: torch.dtype, fused: list[ops.Weights]) -> None:
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    for width, multiplier, bias, shape in ((32, 1.0, True, (100,)), (18, 0.7, False, (3, 13)), (34, 0.3, True, (5, 7))):
        model = network(width, spec, multiplier, bias).to(dtype)
        # columns of a wider tensor
        x = torch.randn(*shape, 2 * width, dtype=dtype)[..., ::2].requires_grad_()
        grad = torch.randn(*shape, width, dtype=dtype)
        fused.clear()
        y = model(x)
        assert len(fused) == 1
        expected = by_layers(model, x)
        leaves = [x, *model.parameters()]
        found = (y, *torch.autograd.grad(y, leaves, grad))
        for ours, exact in zip(found, (expected, *torch.autograd.grad(expected, leaves, grad)), strict=True):
            assert (ours - exact).norm() <= tolerance * exact.norm()
        with torch.no_grad():
            torch.testing.assert_close(model(x), y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("spec", "factors"), [("dense", "A"), ("btt", "AB")])
def test_names_of_parameters_are_those_of_saved_runs(spec: str, factors: str) -> None:
    model = ResidualMLP(12, 16, 2, depth=1, structure=spec)
    names = [name.removeprefix("blocks.0.") for name in model.state_dict() if name.startswith("blocks.0.")]
    of_layers = [f"{layer}.{name}" for layer in ("fc1", "fc2") for name in (*factors, "bias")]
    assert names == ["norm.weight", "norm.bias", *of_layers]
    plain = el.Linear(16, 64, spec)
    plain.load_state_dict(model.blocks[0].get_submodule("fc1").state_dict())


def test_normalised_layers_are_fused(fused: list[ops.Weights]) -> None:
    torch.manual_seed(0)
    layers = [el.Linear(32, 128, "btt", normalize=True), el.Linear(128, 32, "btt", normalize=True)]
    with torch.no_grad():
        for layer in layers:
            layer.A.mul_(100)
    made = iter(layers)
    model, x = ResidualFeedForward(32, lambda *_: next(made)), torch.randn(40, 32)
    torch.testing.assert_close(model(x), by_layers(model, x))
    assert len(fused) == 1


class Doubled(el.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("layer", ["fc1", "fc2"])
@pytest.mark.parametrize("kind", ["dense", "torch", "subclass", "hook"])
def test_other_layers_are_called(kind: str, layer: str, fused: list[ops.Weights]) -> None:
    model, x = network(32, "btt"), torch.randn(40, 32)
    sizes = (32, 128) if layer == "fc1" else (128, 32)
    seen: list[nn.Module] = []
    if kind == "hook":
        model.get_submodule(layer).register_forward_hook(lambda module, args, y: seen.append(module) or 2 * y)
    else:
        others = {"dense": DenseLinear(*sizes, "dense"), "torch": nn.Linear(*sizes), "subclass": Doubled(*sizes, "btt")}
        setattr(model, layer, others[kind])
    torch.testing.assert_close(model(x), by_layers(model, x))
    assert fused == []
    assert len(seen) == (2 if kind == "hook" else 0)


def test_guides_are_not_bypassed(fused: list[ops.Weights]) -> None:
    model, x = ResidualMLP(12, 32, 2, depth=1, structure="btt"), torch.randn(40, 12)
    guide(model)
    model(x)
    assert fused == []
    unguide(model)
    model(x)
    assert len(fused) == 1


# Attention


def attention(structure: str = "btt", **options: Any) -> Any:
    torch.manual_seed(0)
    config = MLPConfig(width=32, structure=structure)
    return Attention(32, heads=4, layer=Layers(config).linear, **options)


def one_by_one(model: Any, x: Tensor) -> Tensor:
    """What attention computes, with layers that are called."""
    h = model.norm(x)
    heads = [layer(h).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (model.query, model.key, model.value)]
    query, key = model.query_norm(heads[0]), model.key_norm(heads[1])
    mixed = F.scaled_dot_product_attention(query, key, heads[2], scale=8 / query.shape[-1])
    found: Tensor = x + model.out(mixed.transpose(1, 2).flatten(2))
    return found


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The output features of the products that ran in `ops.shared_input_linear`."""
    found: list[int] = []
    linear = shared_input.linear
    monkeypatch.setattr(shared_input, "linear", lambda s, *rest: (found.append(s.out_features), linear(s, *rest))[1])
    return found


@pytest.mark.parametrize("options", [{}, {"d_head": 4}, {"qk_norm": True}])
def test_queries_keys_and_values_are_one_product(options: dict[str, Any], widths: list[int]) -> None:
    model, x = attention(**options).double(), torch.randn(2, 50, 32, dtype=torch.float64, requires_grad=True)
    y, expected = model(x), one_by_one(model, x)
    assert widths == [3 * model.features]
    leaves, grad = [x, *model.parameters()], torch.randn_like(y)
    found = [y, *torch.autograd.grad(y, leaves, grad)]
    torch.testing.assert_close(found, [expected, *torch.autograd.grad(expected, leaves, grad)])


def test_unequal_projections(widths: list[int]) -> None:
    model, x = attention(), torch.randn(2, 50, 32)
    model.query = el.Linear(32, 32, "low_rank")
    torch.testing.assert_close(model(x), one_by_one(model, x))
    assert widths == [64, 32]


@pytest.mark.parametrize("layer", ["query", "value"])
@pytest.mark.parametrize("kind", ["dense", "subclass", "hook"])
def test_other_projections_are_called(kind: str, layer: str, widths: list[int]) -> None:
    model, x, seen = attention(), torch.randn(2, 50, 32), list[nn.Module]()
    if kind == "hook":
        model.get_submodule(layer).register_forward_hook(lambda module, args, y: seen.append(module) or 2 * y)
    else:
        setattr(model, layer, {"dense": DenseLinear(32, 32, "dense"), "subclass": Doubled(32, 32, "btt")}[kind])
    torch.testing.assert_close(model(x), one_by_one(model, x))
    assert widths == []
    assert len(seen) == (2 if kind == "hook" else 0)


# Dense models


def test_dense_models_run_as_those_of_torch(fused: list[ops.Weights], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same kernels as `nn.Linear`, since times are compared with theirs."""
    model, x = ResidualMLP(12, 32, 2, depth=2), torch.randn(40, 12)
    dense = [layer for layer in model.modules() if isinstance(layer, el.Linear)]
    assert len(dense) == 5
    assert {type(layer) for layer in dense} == {DenseLinear}
    monkeypatch.setattr(ops, "linear", lambda *_: pytest.fail("it has kernels of its own"))
    y = model(x)
    assert fused == []
    twin = ResidualMLP(12, 32, 2, depth=2)
    el.densify(twin)
    assert not any(isinstance(layer, el.Linear) for layer in twin.modules())
    twin.load_state_dict({name.replace(".A", ".weight"): value for name, value in model.state_dict().items()})
    assert torch.equal(twin(x), y)


def test_a_dense_layer_among_structured_ones(fused: list[ops.Weights]) -> None:
    model = network(32, "btt", down_structure="dense")
    assert [type(layer) for layer in (model.fc1, model.fc2)] == [el.Linear, DenseLinear]
    x = torch.randn(40, 32)
    torch.testing.assert_close(model(x), by_layers(model, x))
    assert fused == []
    guide(model)
    assert "guide" in dict(model.fc1.named_parameters())
    assert "guide" not in dict(model.fc2.named_parameters())
    unguide(model)
    assert type(model.fc2) is DenseLinear
