"""`Linear` as a citizen of torch: shapes, dtypes, autocast, compile, export, copies, files, errors."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from tests.families import SAMPLES
from torch import nn
from torch.nn.utils import parametrize

import einlinear as el

SPECS = [specs[-1] for specs in SAMPLES.values()]


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 16), (0, 16), (2, 0, 16), (1, 1, 1, 16)])
@pytest.mark.parametrize("spec", SPECS)
def test_any_leading_shape(spec: str, shape: tuple[int, ...]) -> None:
    layer = el.Linear(16, 24, spec)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == nn.Linear(16, 24)(x).shape
    torch.testing.assert_close(y, x @ layer.dense_weight().T + layer.bias)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("x", [torch.randn(16, 5).T, torch.randn(1, 16).expand(5, 16), torch.randn(5, 32)[:, ::2]])
def test_strided_inputs(x: torch.Tensor) -> None:
    layer = el.Linear(16, 24, "btt(rank=2)")
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


def test_only_required_gradients_are_computed() -> None:
    layer = el.Linear(16, 24, "btt")
    layer.B.requires_grad_(False)
    x = torch.randn(3, 16)
    layer(x).sum().backward()
    assert layer.A.grad is not None
    assert layer.B.grad is None
    assert x.grad is None


def test_wrong_width_raises_as_torch_does() -> None:
    for layer in (el.Linear(16, 24, "btt"), nn.Linear(16, 24)):
        with pytest.raises(RuntimeError, match=r"in_features=16|cannot be multiplied"):
            layer(torch.randn(2, 15))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype(dtype: torch.dtype) -> None:
    layer = el.Linear(64, 64, "btt(rank=2)", dtype=dtype)
    x = torch.randn(8, 64, dtype=dtype)
    y = layer(x)
    assert y.dtype == layer.A.dtype == dtype
    exact = x.double() @ layer.double().dense_weight().T + layer.bias
    dense_error = (x @ torch.randn(64, 64, dtype=dtype) / 8).abs().max() * torch.finfo(dtype).eps * 8
    assert (y.double() - exact).abs().max() < max(float(dense_error), 1e-12)


def test_autocast() -> None:
    layer = el.Linear(64, 32, "btt")
    x = torch.randn(4, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        assert layer(x.double().float()).dtype == nn.Linear(64, 32)(x).dtype
    y.float().sum().backward()
    assert layer.A.grad is not None
    assert layer.A.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("spec", SPECS)
def test_compile_without_graph_breaks(spec: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()  # its limit of recompilations counts over all structures of this test
    layer = el.Linear(16, 24, spec, normalize=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 16)
    torch.testing.assert_close(compiled(x), layer(x))
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    found = torch.autograd.grad(compiled(x).square().sum(), list(layer.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_export() -> None:
    layer, x = el.Linear(16, 24, "monarch(blocks=2)"), torch.randn(5, 16)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_copies_and_files(tmp_path: Path) -> None:
    layer, x = el.Linear(16, 24, "dyad", normalize=True), torch.randn(5, 16)
    y = layer(x)
    torch.testing.assert_close(copy.deepcopy(layer)(x), y)
    assert list(layer.state_dict()) == ["A", "gamma_A", "B", "gamma_B", "bias"]
    other = el.Linear(16, 24, "dyad", normalize=True)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), y)
    safetensors.torch.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    third = el.Linear(16, 24, "dyad", normalize=True)
    third.load_state_dict(safetensors.torch.load_file(tmp_path / "layer.safetensors"))
    torch.testing.assert_close(third(x), y)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)
    with pytest.raises(RuntimeError, match="size mismatch"):
        el.Linear(16, 24, "dyad(blocks=2)", normalize=True).load_state_dict(layer.state_dict())


def test_meta_device() -> None:
    layer = el.Linear(4096, 11008, "btt", device="meta")
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.empty(2, 4096, device="meta")).shape == (2, 11008)
    with torch.device("meta"):
        assert el.Linear(16, 16, "btt").A.is_meta
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.A.std() > 0


def test_a_parametrised_factor_is_used() -> None:
    class Double(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    layer, x = el.Linear(16, 24, "btt", bias=False), torch.randn(5, 16)
    y = layer(x)
    parametrize.register_parametrization(layer, "A", Double())
    torch.testing.assert_close(layer(x), 2 * y)
    torch.testing.assert_close(layer.dense_weight() @ x[0], 2 * y[0])


def test_normalize_is_the_published_formula() -> None:
    layer = el.Linear(16, 64, "btt", normalize=True, dtype=torch.float64)
    plain = el.Linear(16, 64, "btt", dtype=torch.float64)
    with torch.no_grad():
        layer.A.mul_(5)  # too large: scaled back to sigma
        layer.B.mul_(0.01)  # small: left alone
        layer.gamma_A.fill_(3)
        sigma = (min(4, 8) ** 0.5) / 4
        rms = (layer.A.square().mean() + 1e-8).sqrt()
        assert rms > sigma
        plain.A.copy_(3 * layer.A / (rms / sigma))
        plain.B.copy_(layer.B)
    x = torch.randn(3, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer.to_dense()(x), plain(x))


def test_normalize_without_gamma() -> None:
    layer = el.Linear(16, 64, "btt", normalize=True, gamma=False)
    other = el.Linear(16, 64, "btt", normalize=True)
    assert set(layer.state_dict()) == {"A", "B", "bias"}
    other.load_state_dict(layer.state_dict(), strict=False)
    with torch.no_grad():
        for p in (layer.A, other.A):
            p.mul_(100)
    x = torch.randn(3, 16)
    torch.testing.assert_close(layer(x), other(x))  # whose gammas are one
    layer.reset_parameters()


def test_every_argument_changes_something() -> None:
    assert el.Linear(16, 24, "btt", bias=False).bias is None
    assert el.Linear(16, 24, "btt", normalize=True).gamma_A.shape == (1,)  # FSDP2 refuses parameters without dimensions
    assert not hasattr(el.Linear(16, 24, "btt", normalize=True, gamma=False), "gamma_A")
    assert el.Linear(16, 24, "btt", dtype=torch.float64).A.dtype == torch.float64
    assert el.Linear(16, 24, el.structure("btt", 16, 24)).structure == el.Linear(16, 24, "btt").structure


def test_repr_names_the_structure_and_its_cost() -> None:
    assert repr(el.Linear(1024, 1024, "btt", bias=False)) == (
        "Linear(in_features=1024, out_features=1024, structure='btt', bias=False, "
        "params=65536, macs=65536 (6.2% of dense))"
    )
    assert "normalize=True, gamma=False, params" in repr(el.Linear(16, 24, "btt", normalize=True, gamma=False))


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="unknown family 'bt'"):
        el.Linear(16, 16, "bt")
    with pytest.raises(ValueError, match="the structure is of 16 -> 16 features, the layer of 16 -> 24"):
        el.Linear(16, 24, el.structure("btt", 16, 16))
    with pytest.raises(TypeError):
        el.Linear(16, 24, "btt", rank=2)


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8, torch.tensor])
def test_integers_of_any_kind(integer: Any) -> None:
    """As torch.nn.Linear takes them; what is derived from them are ints."""
    n, m, two = integer(16), integer(24), integer(2)
    assert el.structure("btt", n, m, rank=two) == el.structure("btt(rank=2)", 16, 24)
    assert el.structure("i, r i, o r -> o", n, m, sizes={"r": two}).spec == "i, r i, o r -> o where r=2"
    assert el.structure("blast", n, m, blocks=two, rank=two).spec == "blast(blocks=2, rank=2)"
    layers = (el.Linear(n, m, "btt", device="meta"), el.MoELinear(n, m, "btt", experts=two, active=integer(1)))
    for layer in layers:
        numbers = (layer.in_features, layer.out_features, *layer.A.shape)
        assert {type(number) for number in numbers} == {int}
        assert "in_features=16, out_features=24" in repr(layer)
    assert (type(layers[1].experts), type(layers[1].active)) == (int, int)
    assert el.Linear(n, m, el.structure("btt", n, m))(torch.ones(2, 16)).shape == (2, 24)


def test_numbers_of_numpy_that_are_no_integers() -> None:
    theta = (np.float64(0.5), np.float32(0.25), 0.25, 1, 0, np.int64(0), np.float32(0.5))
    spec = "einsum(theta=(1/2, 1/4, 1/4, 1, 0, 0, 1/2))"
    assert el.structure("einsum", 64, 64, theta=theta) == el.structure(spec, 64, 64)
    assert el.structure("btt", 64, 64, max_macs=np.float32(0.5)) == el.structure("btt", 64, 64, max_macs=0.5)


@pytest.mark.parametrize("wrong", [16.0, np.float64(16), True, np.bool_(True), "16", None, torch.tensor(16.0)])
def test_no_integers(wrong: Any) -> None:
    with pytest.raises(TypeError, match="in_features must be an int"):
        el.Linear(wrong, 16, "btt")
    with pytest.raises(TypeError, match="btt: rank must be a whole number"):
        el.structure("btt", 16, 16, rank=wrong)
    with pytest.raises(TypeError, match="the size of axis 'r' must be an int"):
        el.structure("i, r i, o r -> o", 16, 16, sizes={"r": wrong})
    with pytest.raises(TypeError, match="experts must be an int"):
        el.MoELinear(16, 16, "btt", experts=wrong)


@pytest.mark.parametrize("structure", ["dense", "btt"])
def test_the_weight_is_a_copy(structure: str) -> None:
    """Whoever writes into it, as models of others do, changes nothing."""
    layer = el.Linear(16, 16, structure)
    before = layer.dense_weight()
    torch.testing.assert_close(layer.weight, before)
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(layer.dense_weight(), before)
    layer.A = torch.nn.Parameter(layer.A.to("meta"))  # half of a layer that is being loaded
    assert (layer.weight.shape, layer.weight.is_meta) == ((16, 16), True)
