"""Quantized layers: the same function after every way to copy, store and move them, and the bytes they say."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import einlinear as el
from einlinear.compression.factor_rounding import round_factors
from einlinear.nn.quantized_linear import QuantizedLinear, quantized_bytes

STRUCTURES = ["dense", "low_rank(rank=40)", "monarch(blocks=2)", "blast(blocks=4, rank=24)", "btt(rank=2)"]
PRECISIONS = ["bfloat16", "int8", "int4(group=32)", "int3"]


def quantized(structure: str, precision: str, bias: bool = True, **config: Any) -> tuple[QuantizedLinear, el.Linear]:
    """A quantized layer, and the structured one that it was made from."""
    torch.manual_seed(0)
    exact = el.Linear(96, 72, structure, bias)
    layer = QuantizedLinear(96, 72, structure, bias, precision=precision, **config)
    layer.store(round_factors(exact.structure, exact.factors(), layer.formats, exact.dense_weight()))
    if bias:
        nn.init.normal_(exact.bias)
        layer.bias.data.copy_(exact.bias)
    return layer.eval(), exact


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_function_is_nearly_that_of_the_factors(structure: str, precision: str) -> None:
    layer, exact = quantized(structure, precision)
    x = torch.randn(5, 96)
    y, expected = layer(x), exact(x)
    bound = {"bfloat16": 0.01, "int8": 0.03, "int4(group=32)": 0.3, "int3": 0.6}[precision]
    assert 0 < (y - expected).norm() < bound * (expected - exact.bias).norm()
    assert torch.allclose(y, nn.functional.linear(x, layer.dense_weight(), layer.bias), atol=1e-5)
    assert torch.allclose(y, layer.to_dense()(x), atol=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_bytes_are_those_of_the_state(structure: str, precision: str) -> None:
    layer, exact = quantized(structure, precision, bias=False)
    assert (
        layer.nbytes
        == quantized_bytes(layer.structure, precision)
        == sum(t.nbytes for t in layer.state_dict().values())
    )
    assert layer.nbytes < 4 * exact.structure.params / 1.9


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("structure", ["dense", "blast(blocks=4, rank=24)"])
def test_copies_have_the_same_outputs(structure: str, bias: bool, tmp_path: Path) -> None:
    layer, _ = quantized(structure, "int4(group=32)", bias)
    x = torch.randn(3, 96)
    expected = layer(x)
    loaded = QuantizedLinear(96, 72, structure, bias, precision="int4(group=32)")
    assert not loaded(x).any()
    loaded.load_state_dict(layer.state_dict())
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
    from safetensors.torch import load_model, save_model

    save_model(layer, str(tmp_path / "layer.safetensors"))
    copies.append(QuantizedLinear(96, 72, structure, bias, precision="int4(group=32)"))
    load_model(copies[-1], str(tmp_path / "layer.safetensors"))
    for twin in copies:
        assert torch.equal(twin(x), expected)
    other = QuantizedLinear(96, 72, structure, bias, precision="int8")
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(layer.state_dict())


def test_other_dtypes_leave_the_stored_bits() -> None:
    layer, _ = quantized("low_rank(rank=40)", "int4(group=32)", bias=False)
    x, before = torch.randn(3, 96), copy.deepcopy(layer.state_dict())
    expected = layer(x)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        layer.to(dtype)
        y = layer(x.to(dtype))
        assert y.dtype == layer.dense_weight().dtype == dtype
        assert torch.allclose(y.float(), expected, rtol=0.05, atol=0.05)
    layer.to("meta")
    layer.to_empty(device="cpu").float().load_state_dict(before)
    assert torch.equal(layer(x), expected)


def test_it_is_compiled() -> None:
    layer, _ = quantized("low_rank(rank=40)", "int4(group=32)")
    x = torch.randn(3, 96)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), layer(x), atol=1e-5)


def test_only_the_bias_is_trained() -> None:
    layer, _ = quantized("low_rank(rank=40)", "int8")
    x = torch.randn(3, 96, requires_grad=True)
    layer(x).sum().backward()
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert torch.allclose(x.grad, layer.dense_weight().sum(0).expand(3, -1), atol=1e-4)
    model = nn.Sequential(layer)
    (group,) = el.param_groups(model, 1e-3, base=model)
    assert group["params"] == [layer.bias]


def test_models_are_made_dense_again() -> None:
    layer, _ = quantized("low_rank(rank=40)", "int8")
    model = nn.Sequential(layer)
    x = torch.randn(3, 96)
    expected = model(x)
    el.densify(model)
    assert type(model[0]) is nn.Linear
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_unknown_precisions_raise() -> None:
    with pytest.raises(ValueError, match="written as 'int8' or"):
        QuantizedLinear(8, 8, "dense", precision="fp4")


@pytest.mark.parametrize("structure", ["dense", "btt(rank=2)"])
def test_its_weight_is_read_as_that_of_any_layer(structure: str) -> None:
    layer = quantized(structure, "int4(group=32)")[0].bfloat16()
    assert (layer.weight.dtype, layer.weight.shape) == (torch.bfloat16, (layer.out_features, layer.in_features))
    nn.init.normal_(layer.weight)  # lost, as in any structured layer
    torch.testing.assert_close(layer.weight + 0, layer.dense_weight())


def test_fused_blocks_take_it() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = QuantizedLinear(64, 256, "dense", precision="int8")
            self.down = el.Linear(256, 64, "low_rank(rank=16)")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.nn.functional.gelu(self.up(x)))

    model, x = Block(), torch.randn(3, 64)
    expected = model(x)
    el.fuse(model)
    torch.testing.assert_close(model(x), expected)
