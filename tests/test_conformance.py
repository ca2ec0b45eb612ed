"""What every structure must satisfy, whatever its family: one row in `tests/families.py` brings all of it.

The dense matrix, made by a single einsum over the factors, is what layers, gradients, executors and counts are
compared with; that it is the matrix the family promises is tested in `test_index_maps.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import einlinear as el
from einlinear import ops
from einlinear.structures import FAMILIES, Structure
from tests.families import PATTERNS, SAMPLES

SPECS = [spec for specs in SAMPLES.values() for spec in specs] + PATTERNS
FEATURES = st.one_of(st.integers(1, 40), st.sampled_from([16, 32, 36, 47, 48, 60, 64, 97, 127, 128]))
RANDOM = st.integers(0, 2**32 - 1)


def draw(spec: str, in_features: int, out_features: int, seed: int) -> tuple[Structure, list[Tensor]] | None:
    """The structure and random float64 factors; None where these features would have to be padded too far."""
    try:
        s = el.structure(spec, in_features, out_features)
    except ValueError as error:
        assert "nearby sizes that fit" in str(error) or "fewer than" in str(error)
        return None
    generator = torch.Generator().manual_seed(seed)
    return s, [torch.randn(f.shape, dtype=torch.float64, generator=generator, requires_grad=True) for f in s.factors]


def executors(s: Structure) -> list[str]:
    """Those that run float64 here."""
    return [name for name in ops.EXECUTORS if ops.unsupported(name, s, torch.float64, "cpu") is None]


def over_sizes(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test for every spec, at sizes that hypothesis draws: odd, prime, rectangular both ways."""
    return pytest.mark.parametrize("spec", SPECS)(settings(max_examples=25)(given(FEATURES, FEATURES, RANDOM)(test)))


def test_every_family_has_a_row() -> None:
    assert set(SAMPLES) == set(FAMILIES)


@over_sizes
def test_layer_and_gradients_equal_the_dense_path(spec: str, in_features: int, out_features: int, seed: int) -> None:
    drawn = draw(spec, in_features, out_features, seed)
    if drawn is None:
        return
    s, factors = drawn
    layer = el.Linear(in_features, out_features, s, dtype=torch.float64)
    with torch.no_grad():
        for factor, value in zip(s.factors, factors, strict=True):
            getattr(layer, factor.name).copy_(value / math.sqrt(factor.fan_in))
        assert layer.bias is not None
        layer.bias.normal_()
    x = torch.randn(2, 3, in_features, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    expected = x @ layer.dense_weight().T + layer.bias
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, inputs, grad)
    for executor in executors(s):
        y = ops.linear(s, layer.factors(), x, layer.bias, executor)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
        for found, wanted in zip(torch.autograd.grad(y, inputs, grad), expected_grads, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-10)


@over_sizes
def test_counts(spec: str, in_features: int, out_features: int, seed: int) -> None:
    drawn = draw(spec, in_features, out_features, seed)
    if drawn is None:
        return
    s, factors = drawn
    assert s.params == sum(factor.numel() for factor in factors)
    # torch runs a product over an axis of size 1 as an elementwise multiplication, which it does not count by itself
    count_products = {torch.ops.aten.mul: lambda *shapes, out_shape, **kwargs: 2 * math.prod(out_shape)}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=count_products) as counter:
        ops.linear(s, factors, torch.randn(3, in_features, dtype=torch.float64), executor="reference")
    assert counter.get_total_flops() == 2 * 3 * s.macs


@over_sizes
def test_rank_is_that_of_random_factors(spec: str, in_features: int, out_features: int, seed: int) -> None:
    drawn = draw(spec, in_features, out_features, seed)
    if drawn is None:
        return
    s, factors = drawn
    singular = torch.linalg.svdvals(ops.dense_weight(s, factors).detach())
    assert int((singular > 1e-11 * singular[0]).sum()) == s.rank


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("in_features", "out_features"), [(8, 8), (4, 12), (12, 7), (7, 8)])
def test_gradcheck(spec: str, in_features: int, out_features: int) -> None:
    drawn = draw(spec, in_features, out_features, 0)
    if drawn is None:  # `test_sizes_that_do_not_suit` says so
        return
    s, factors = drawn
    x = torch.randn(2, in_features, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(out_features, dtype=torch.float64, requires_grad=True)
    for executor in executors(s):

        def f(x: Tensor, bias: Tensor, *factors: Tensor, executor: str = executor) -> Tensor:
            return ops.linear(s, factors, x, bias, executor)

        assert torch.autograd.gradcheck(f, (x, bias, *factors))
        assert torch.autograd.gradgradcheck(f, (x, bias, *factors))


@pytest.mark.parametrize("spec", SPECS)
def test_initialisation_gives_a_matrix_of_norm_about_one(spec: str) -> None:
    """Of muP: neither the rank nor the number of factors may change the scale of a layer by much."""
    torch.manual_seed(0)
    layer = el.Linear(256, 256, spec)
    norm = float(torch.linalg.matrix_norm(layer.dense_weight().detach(), ord=2))
    assert 0.2 < norm < 2 ** (1 + max(len(term.factors) for term in layer.structure.terms))
