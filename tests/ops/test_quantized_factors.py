"""Quantised factors in the compiled kernel: the product is that of the expanded factors, whatever the format."""

from __future__ import annotations

import pytest
import torch
from tests.families import PATTERNS, SAMPLES, structures
from torch import Tensor

import einlinear as el
from einlinear import ops
from einlinear.nn.quantized_linear import QuantizedLinear
from einlinear.ops.cpu import cpu_backend, quantized_path

SPECS = [spec for specs in SAMPLES.values() for spec in specs] + PATTERNS
PRECISIONS = ["bfloat16", "int8", "int8(group=40)", "int7", "int6", "int5(group=7)", "int4", "int4(group=32)"]
PRECISIONS += ["int4(group=24)", "int3(group=64)", "int2"]
# in the order in which the kernel changes how it multiplies
TOKENS = [1, 2, 3, 5, 8, 15, 16, 33, 70]

pytestmark = pytest.mark.skipif(
    ops.reason_unsupported("cpu", el.structure("btt", 16, 16), torch.float32, "cpu") is not None,
    reason="no compiled kernel",
)


def layer_of(
    structure: el.Structure | str, size: tuple[int, int], precision: str, bias: bool = True
) -> QuantizedLinear:
    """A layer of random codes and scales."""
    torch.manual_seed(0)
    layer = QuantizedLinear(*size, structure, bias, precision=precision).requires_grad_(False)
    for name, buffer in layer.named_buffers():
        numbers = torch.rand(buffer.shape) / 16 if name.endswith("_scales") else torch.randn(buffer.shape)
        buffer.copy_(
            torch.randint(256, buffer.shape) if name.endswith("_codes") else numbers.bfloat16().view(torch.int16)
        )
    if layer.bias is not None:
        layer.bias.normal_()
    return layer


def check(layer: QuantizedLinear, x: Tensor, rounding: float = 0, exactness: float = 1e-6) -> None:
    """Compare with the product in float64, by errors of sums and of the result's dtype."""
    with el.backend("cpu"):
        assert layer.reason_to_expand(x) is None
        y = layer(x)
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], layer.out_features)
    factors = [layer._expanded(*pair).double() for pair in zip(layer.structure.factors, layer.formats, strict=True)]
    bias = 0 if layer.bias is None else layer.bias.double()
    expected = x.double() @ ops.dense_weight(layer.structure, factors).T + bias
    terms = x.double().abs() @ ops.dense_weight(layer.structure, [factor.abs() for factor in factors]).T
    excess = (y - expected).abs() - rounding * expected.abs() - exactness * terms
    assert excess.max() <= exactness


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("spec", SPECS)
def test_the_product_is_that_of_the_expanded_factors(spec: str, precision: str) -> None:
    for structure in structures(spec, [(144, 144), (131, 157)])[-1:]:
        layer = layer_of(structure, (structure.in_features, structure.out_features), precision)
        for tokens in TOKENS:
            check(layer, torch.randn(tokens, layer.in_features))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("spec", ["dense", "low_rank(rank=530)", "monarch(blocks=2)"])
def test_long_rows(spec: str, precision: str) -> None:
    """Rows of several chunks, the last one of any length."""
    for size in [(1100, 36), (1029, 21)]:
        if spec == "monarch(blocks=2)" and size[0] % 2:
            continue
        layer = layer_of(spec, size, precision, bias=False)
        for tokens in TOKENS:
            check(layer, torch.randn(tokens, size[0]))


@pytest.mark.parametrize(
    ("dtype", "rounding", "exactness"),
    [(torch.bfloat16, 2**-8, 1e-6), (torch.float16, 2**-11, 1e-6), (torch.float64, 0, 1e-15)],
)
@pytest.mark.parametrize("precision", ["bfloat16", "int8", "int4(group=32)", "int3"])
@pytest.mark.parametrize("spec", ["dense", "low_rank(rank=40)", "monarch(blocks=4)", "btt(rank=2)"])
def test_other_dtypes_are_rounded_once(
    spec: str, precision: str, dtype: torch.dtype, rounding: float, exactness: float
) -> None:
    layer = layer_of(spec, (144, 144), precision).to(dtype)
    for tokens in (1, 7, 40):
        check(layer, torch.randn(tokens, 144, dtype=dtype), rounding, exactness)


@pytest.mark.parametrize("precision", ["int8", "int4(group=32)", "int3"])
@pytest.mark.parametrize("tokens", [3, 8, 20])
def test_a_nan_stays_in_its_token(precision: str, tokens: int) -> None:
    for spec in ("dense", "monarch(blocks=4)"):
        layer, x = layer_of(spec, (144, 144), precision), torch.randn(tokens, 144)
        expected = layer(x)
        x[1, 100] = torch.nan
        with el.backend("cpu"):
            y = layer(x)
        others = torch.arange(tokens) != 1
        torch.testing.assert_close(y[others], expected[others])
        with el.backend("reference"):
            assert torch.equal(y.isnan(), layer(x).isnan())


@pytest.mark.parametrize("shape", [(), (2, 1, 3), (0,), (2, 0)])
def test_inputs_of_any_shape(shape: tuple[int, ...]) -> None:
    layer, x = layer_of("low_rank(rank=40)", (96, 72), "int4(group=32)"), torch.randn(*shape, 96)
    y = layer(x)
    assert y.shape == (*shape, 72)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.dense_weight(), layer.bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 12, 100])
def test_threads_share_the_work(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_backend, "PARALLEL_MACS", 0)
    quantized_path._prepare.cache_clear()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for precision in ("bfloat16", "int8", "int4(group=32)", "int3"):
            for spec in ("dense", "btt(rank=2)"):
                check(layer_of(spec, (144, 200), precision), torch.randn(tokens, 144))
    finally:
        torch.set_num_threads(threads)
        quantized_path._prepare.cache_clear()


def test_explain_says_whether_factors_are_expanded() -> None:
    layer, x = layer_of("low_rank(rank=40)", (96, 72), "int8"), torch.randn(4, 96)
    choice = el.explain(layer, x)
    assert choice.backend == "cpu"
    assert "the int8 factors as they are stored" in choice.reason
    cases = {
        "a backward pass may follow": x.clone().requires_grad_(),
        "not contiguous": torch.randn(96, 4).T,
        "plain tensor of the layer's dtype": x.double(),
        "the input is empty": x[:0],
    }
    for reason, other in cases.items():
        assert reason in el.explain(layer, other).reason
    with el.backend("reference"):
        assert "the backend 'reference' multiplies with expanded factors" in el.explain(layer, x).reason
    with torch.autocast("cpu"):
        assert "casts the call" in el.explain(layer, x).reason


def test_other_backends_are_chosen_where_they_are_faster_by_more_than_the_expansion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, x = layer_of("dense", (96, 72), "int8"), torch.randn(4, 96)
    for times, is_expanded in (({"reference": 10.0, "cpu": 15.0}, False), ({"reference": 10.0, "cpu": 30.0}, True)):
        choice = ops.Choice("reference", "", tuple(times.items()))
        monkeypatch.setattr(quantized_path, "choose", lambda *_, choice=choice: choice)
        quantized_path._prepare.cache_clear()
        assert (layer.reason_to_expand(x) is not None) == is_expanded
    quantized_path._prepare.cache_clear()


def test_what_does_not_fit_raises_as_for_other_layers() -> None:
    layer = layer_of("low_rank(rank=40)", (96, 72), "int8")
    with pytest.raises(RuntimeError, match="in_features=96"):
        layer(torch.randn(4, 95))
    with pytest.raises(RuntimeError, match=r"the input is of torch\.float64"):
        layer(torch.randn(4, 96).double())
    layer.A_codes = layer.A_codes[:, :-1]
    with pytest.raises(RuntimeError):
        layer(torch.randn(4, 96))


def test_it_is_exported() -> None:
    layer, x = layer_of("low_rank(rank=40)", (96, 72), "int4(group=32)"), torch.randn(4, 96)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x), rtol=1e-4, atol=1e-4)
