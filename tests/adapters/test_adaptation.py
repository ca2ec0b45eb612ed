"""Adapters of any structure beside any kind of linear layer: they start at zero, and learn."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import SAMPLES
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

import einlinear as el
from einlinear.adapters import AdaptedLinear, Adapter
from einlinear.nn import QuantizedLinear


class Block(nn.Module):
    """Every kind of base layer."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.conv1d = nn.Linear(64, 96), Conv1D(64, 96)
        self.structured = el.Linear(64, 64, "btt(rank=2)", normalize=True)
        self.quantized = QuantizedLinear(64, 64, "dense", precision="int8")
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1d(torch.relu(self.dense(x)))
        y: torch.Tensor = self.head(self.norm(x + self.structured(x) + self.quantized(x)))
        return y


X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def draw(model: nn.Module, name: str = "default") -> None:
    """Give an adapter values other than zero."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, AdaptedLinear) and name in layer.adapters:
                for factor in layer.adapters[name].parameters():
                    factor.normal_(std=0.3)


def adapted(structure: str = "monarch(blocks=4)", **options: Any) -> Block:
    model = Block()
    el.adapt(model, structure, **options)
    draw(model)
    return model


@pytest.mark.parametrize(
    "spec", [spec for specs in SAMPLES.values() for spec in specs] + ["i, r i, o r -> o where r=3"]
)
def test_any_structure_starts_at_zero_and_learns(spec: str) -> None:
    model = Block()
    before = model(X)
    report = el.adapt(model, spec, exclude="head")
    assert [a.name for a in report.adapted] + [name for name, _ in report.skipped] != []
    assert torch.equal(model(X), before)
    model(X).square().sum().backward()
    for a in report.adapted:
        adapter: Any = model.get_submodule(f"{a.name}.adapters.default")
        assert all(p.requires_grad for p in adapter.parameters())
        assert any(p.grad.any() for p in adapter.parameters())
    assert {n for n, p in model.named_parameters() if p.grad is not None} <= {
        n for n, _ in model.named_parameters() if ".adapters.default." in n
    }


def test_the_output_is_the_sum() -> None:
    model = Block()
    dense = model.dense
    el.adapt(model, {"conv1d": "low_rank(rank=2)", "*": "btt"}, scale=0.5)
    draw(model)
    s: Any = model.dense.adapters["default"]
    weight = el.structure("btt", 64, 96)
    layer = el.Linear(64, 96, weight, bias=False)
    layer.load_state_dict({name: s.get_parameter(name) for name in "AB"})
    torch.testing.assert_close(model.dense(X), dense(X) + 0.5 * layer(X))
    torch.testing.assert_close(s.dense_weight(), 0.5 * layer.dense_weight())
    assert model.conv1d.adapters["default"].structure.spec == "low_rank(rank=2)"


def test_report() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 7))
    model.add_module("moe", el.MoELinear(64, 64, "btt", experts=2, active=1))
    model.add_module("attention", nn.MultiheadAttention(64, 2))
    report = el.adapt(model, {"1": "monarch(blocks=4)", "*": "low_rank(rank=2)"})
    assert [(a.name, a.base, a.structure, a.params) for a in report.adapted] == [
        ("0", "Linear 64 -> 64", "low_rank(rank=2)", 256)
    ]
    reasons = dict(report.skipped)
    assert reasons.keys() == {"1", "moe", "attention.out_proj"}
    assert "mixture of experts" in reasons["moe"]
    assert "is never called" in reasons["attention.out_proj"]
    assert (report.trainable, report.params) == (256, sum(p.numel() for p in model.parameters()))
    assert "Trainable: 256 of" in str(report)
    assert "skipped moe: is a mixture" in str(report)


def test_only_the_first_call_freezes() -> None:
    model = Block()
    el.adapt(model, "btt", "dense")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [f"dense.adapters.default.{f}" for f in "AB"]
    model.head.requires_grad_(True)
    el.adapt(model, "btt", "structured")
    trained = {n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"dense", "structured", "head"}


def test_a_shared_layer_has_one_adapter() -> None:
    layer = nn.Linear(64, 64)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    report = el.adapt(model, "btt")
    assert [a.name for a in report.adapted] == ["0"]
    assert isinstance(model[0], AdaptedLinear)
    assert model[0] is model[2]


def test_dropout_is_of_training_alone() -> None:
    model = adapted(dropout=0.9).eval()
    other = adapted()
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(X), other.eval()(X))
    assert not torch.equal(model.train()(X), model(X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    """Factors have the dtype of the layer, or the one asked for; outputs that of the layer."""
    model = nn.Sequential(nn.Linear(64, 64, dtype=dtype))
    el.adapt(model, "btt")
    assert {p.dtype for p in model.parameters()} == {dtype}
    el.adapt(model, "btt", name="wide", dtype=torch.float32)
    draw(model, "wide")
    assert model[0].adapters["wide"].A.dtype == torch.float32
    y = model(X.to(dtype))
    assert y.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.float()(X).float(), model(X).float())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"structure": "mono"}, ValueError, "mono"),
        ({"structure": 3}, TypeError, "3"),
        ({"structure": {}}, ValueError, "mapping of globs to structures is empty"),
        ({"layers": "*.q_proj"}, ValueError, r"layers: '\*\.q_proj' matches no linear layer; the nearest are"),
        ({"layers": 1}, TypeError, "layers must be a glob"),
        ({"exclude": "nothing"}, ValueError, "exclude: 'nothing' matches no"),
        ({"exclude": "*"}, ValueError, "no layer could be adapted: none matches"),
        ({"scale": "1"}, TypeError, "scale must be a number, not '1'"),
        ({"scale": float("nan")}, ValueError, "scale must be finite"),
        ({"dropout": 1.0}, ValueError, "dropout must be from 0 to less than 1, not 1.0"),
        ({"dropout": True}, TypeError, "dropout must be a number"),
        ({"name": "a.b"}, ValueError, "name must be a word without dots"),
        ({"name": "keys"}, ValueError, "no attribute of nn.ModuleDict, not 'keys'"),
        ({"name": "training"}, ValueError, "no attribute of nn.ModuleDict, not 'training'"),
        ({"name": ""}, ValueError, "name must be a word"),
        ({"name": 1}, TypeError, "name must be text, not 1"),
    ],
)
def test_bad_arguments_leave_the_model_unchanged(arguments: Any, error: type[Exception], message: str) -> None:
    model = Block()
    with pytest.raises(error, match=message):
        el.adapt(model, **{"structure": "btt"} | arguments)
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_bad_models() -> None:
    with pytest.raises(ValueError, match="the model is itself a linear layer"):
        el.adapt(nn.Linear(4, 4), "btt")
    model = adapted()
    with pytest.raises(ValueError, match="dense: has an adapter named 'default' already: give another name"):
        el.adapt(model, "btt", "dense")
    with pytest.raises(ValueError, match=r"1\.weight has no values yet: call the model once"):
        el.adapt(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)), "btt")
    for function in (el.adapters.merge, el.adapters.unmerge, el.adapters.remove):
        with pytest.raises(ValueError, match="the model has no adapters"):
            function(Block())


def test_parametrized_layers_can_be_adapted() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(64, 64)))
    before = model(X)
    el.adapt(model, "btt")
    torch.testing.assert_close(model(X), before)
    with pytest.raises(ValueError, match="0: an adapter cannot be merged into a ParametrizedLinear"):
        el.adapters.merge(model)


def test_copies_state_dicts_and_meta() -> None:
    model = adapted("btt(rank=2)")
    after = model(X)
    assert torch.equal(copy.deepcopy(model)(X), after)
    other = Block()
    el.adapt(other, "btt(rank=2)")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), after)
    with torch.device("meta"):
        third = Block()
    el.adapt(third, "btt(rank=2)")
    assert all(p.is_meta for p in third.parameters())
    third.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(third(X), after)
    wrong = Block()
    el.adapt(wrong, {"dense": "btt(rank=2)", "*": "dyad"})
    with pytest.raises(RuntimeError, match=r"conv1d\.adapters\.default"):
        wrong.load_state_dict(model.state_dict())
    for p in model.parameters():
        assert not vars(p)


def test_compiled_in_one_graph() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), el.Linear(64, 64, "btt"))
    el.adapt(model, "monarch(blocks=4)", scale=0.5)
    draw(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), model(X))
    gradients = []
    for run in (compiled, model):
        model.zero_grad()
        run(X).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients)


def test_fsdp2(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), el.Linear(64, 64, "btt"))
    el.adapt(model, "btt(rank=2)")
    draw(model)
    after, shapes = model(X), {n: p.shape for n, p in model.named_parameters()}
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    fresh = copy.deepcopy(model)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        for layer in (*model, model):
            fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        assert {n: p.shape for n, p in model.named_parameters()} == shapes
        assert all(isinstance(p, DTensor) for p in model.parameters())
        groups = el.param_groups(model, lr=1e-2, base=None)
        assert {name for group in groups for name in group["param_names"]} == shapes.keys()
        torch.testing.assert_close(model(X), after)
        with pytest.raises(ValueError, match=r"0: has a sharded weight: call el\.adapt before fully_shard"):
            el.adapt(model, "btt", name="late")
        with pytest.raises(ValueError, match="an adapter cannot be merged into a DTensor"):
            el.adapters.merge(nn.Sequential(model[0]))
        model(X).square().sum().backward()
        assert [n for n, p in model.named_parameters() if p.grad is not None] == trained
        torch.optim.AdamW(groups).step()
        el.adapters.save(model, tmp_path / "a.safetensors")
        el.adapters.load(fresh, tmp_path / "a.safetensors")
        trained_output = model(X)
    finally:
        torch.distributed.destroy_process_group()
    assert not torch.allclose(trained_output, after, atol=1e-3)
    torch.testing.assert_close(fresh(X), trained_output)


def test_learning_rates_are_those_of_the_structure() -> None:
    """Relative to a dense layer of the same width, as for `el.Linear`."""
    model = adapted("btt(rank=2)")
    rates = {n: g["lr_mult"] for g in el.param_groups(model, lr=1e-3, base=None) for n in g["param_names"]}
    expected = {
        n: g["lr_mult"]
        for g in el.param_groups(nn.Sequential(el.Linear(64, 96, "btt(rank=2)")), lr=1e-3, base=None)
        for n in g["param_names"]
    }
    assert rates["dense.base_layer.weight"] == 1
    assert {f: rates[f"dense.adapters.default.{f}"] for f in "AB"} == {f: expected[f"0.{f}"] for f in "AB"}
    assert rates["dense.adapters.default.A"] != 1
    el.init_(model)
    assert not model.dense.adapters["default"](X).any()
    with torch.device("meta"):
        base = Block()
    el.adapt(base, "low_rank(rank=2)", layers=["dense", "conv1d", "structured", "quantized", "head"])
    el.param_groups(model, lr=1e-3, base=base)


def test_before_and_after_convert_densify_and_fuse() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    el.convert(model, "btt(rank=2)")
    el.adapt(model, "monarch(blocks=4)")
    draw(model)
    x = torch.randn(300, 64)
    after = model(x)
    fused = copy.deepcopy(model)
    el.fuse(fused)
    torch.testing.assert_close(fused(x), after)
    with pytest.raises(ValueError, match=r"0: an adapter cannot be merged into a structured layer .*el\.densify"):
        el.adapters.merge(model)
    report = el.densify(model)
    assert [c.name for c in report.converted] == ["0.base_layer", "2.base_layer"]
    assert isinstance(model[0].adapters["default"], Adapter)
    assert not model[0].base_layer.weight.requires_grad
    torch.testing.assert_close(model(x), after)
    el.adapters.merge(model)
    torch.testing.assert_close(model(x), after)
    el.adapters.remove(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.GELU, nn.Linear]
    torch.testing.assert_close(model(x), after)


@pytest.mark.parametrize("layer", ["0", "2"])
def test_one_layer_of_a_fused_block(layer: str) -> None:
    """The first layer's adapter ends the block; that of the last reads its hidden features."""
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    el.convert(model, "btt(rank=2)")
    el.adapt(model, "monarch(blocks=4)", layer)
    draw(model)
    x, gradients = torch.randn(300, 64), []
    after = model(x)
    for fuse in (False, True):
        if fuse:
            el.fuse(model)
        model.zero_grad()
        torch.testing.assert_close(model(x), after)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)
