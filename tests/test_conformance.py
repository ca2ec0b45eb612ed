"""What every structure must satisfy, whatever its family: one row in `tests/families.py` brings all of it.

The dense matrix, made by a single einsum over the factors, is what layers, gradients, backends and counts are
compared with; that it is the matrix the family promises is tested in `test_index_maps.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import einlinear as el
from einlinear import ops
from einlinear.structures import FAMILIES, DoesNotFit, Structure
from einlinear.structures.spec import parse_family
from tests.families import PATTERNS, SAMPLES, structures

SPECS = [spec for specs in SAMPLES.values() for spec in specs] + PATTERNS
FEATURES = st.one_of(st.integers(1, 40), st.sampled_from([16, 32, 36, 47, 48, 60, 64, 97, 127, 128]))
SIZES = st.one_of(st.tuples(FEATURES, FEATURES), FEATURES.map(lambda n: (n, n)))
RANDOM = st.integers(0, 2**32 - 1)


def draw(spec: str, size: tuple[int, int], seed: int) -> tuple[Structure, list[Tensor]]:
    """The structure and random float64 factors. A size that does not fit is drawn again; it is an error if most do."""
    try:
        s = el.structure(spec, *size)
    except DoesNotFit:
        reject()
    return s, random_factors(s, seed)


def random_factors(s: Structure, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(f.shape, dtype=torch.float64, generator=generator, requires_grad=True) for f in s.factors]


def backends(s: Structure) -> list[str]:
    """Those that run float64 here."""
    return [name for name in ops.BACKENDS if ops.reason_unsupported(name, s, torch.float64, "cpu") is None]


def over_sizes(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test for every spec, at sizes that hypothesis draws: odd, prime, rectangular both ways."""
    return pytest.mark.parametrize("spec", SPECS)(settings(max_examples=20)(given(SIZES, RANDOM)(test)))


def test_every_family_has_a_row() -> None:
    assert set(SAMPLES) == set(FAMILIES)


@over_sizes
def test_layer_and_gradients_equal_the_dense_path(spec: str, size: tuple[int, int], seed: int) -> None:
    s, factors = draw(spec, size, seed)
    layer = el.Linear(*size, s, dtype=torch.float64)
    with torch.no_grad():
        for factor, value in zip(s.factors, factors, strict=True):
            getattr(layer, factor.name).copy_(value / math.sqrt(factor.fan_in))
        assert layer.bias is not None
        layer.bias.normal_()
    x = torch.randn(2, 3, s.in_features, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    expected = x @ layer.dense_weight().T + layer.bias
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, inputs, grad)
    for backend in backends(s):
        y = ops.linear(s, layer.factors(), x, layer.bias, backend)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
        for found, wanted in zip(torch.autograd.grad(y, inputs, grad), expected_grads, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-10)


@over_sizes
def test_counts(spec: str, size: tuple[int, int], seed: int) -> None:
    s, factors = draw(spec, size, seed)
    assert s.params == sum(factor.numel() for factor in factors)
    # torch runs a product over an axis of size 1 as an elementwise multiplication, which it does not count by itself
    count_products = {torch.ops.aten.mul: lambda *shapes, out_shape, **kwargs: 2 * math.prod(out_shape)}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=count_products) as counter:
        ops.linear(s, factors, torch.randn(3, s.in_features, dtype=torch.float64), backend="reference")
    assert counter.get_total_flops() == 2 * 3 * s.macs


@over_sizes
def test_rank_is_that_of_random_factors(spec: str, size: tuple[int, int], seed: int) -> None:
    s, factors = draw(spec, size, seed)
    singular = torch.linalg.svdvals(ops.dense_weight(s, factors).detach())
    assert int((singular > 1e-11 * singular[0]).sum()) == s.rank


# sizes at which it is quick; monarch has none below 16 x 16
SMALL = [s for spec in SPECS for s in structures(spec, [(8, 8), (4, 12), (12, 7), (7, 8), (16, 16)])[:4]]


@pytest.mark.parametrize("s", SMALL, ids=str)
def test_gradcheck(s: Structure) -> None:
    factors = random_factors(s, 0)
    x = torch.randn(2, s.in_features, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(s.out_features, dtype=torch.float64, requires_grad=True)
    for backend in backends(s):

        def f(x: Tensor, bias: Tensor, *factors: Tensor, backend: str = backend) -> Tensor:
            return ops.linear(s, factors, x, bias, backend)

        assert torch.autograd.gradcheck(f, (x, bias, *factors))
        assert torch.autograd.gradgradcheck(f, (x, bias, *factors), fast_mode=True)


@pytest.mark.parametrize("spec", SPECS)
def test_initialisation_gives_a_matrix_of_norm_about_one(spec: str) -> None:
    """Of muP: neither the rank nor the number of factors may change the scale of a layer by much."""
    torch.manual_seed(0)
    layer = el.Linear(256, 256, spec)
    norm = float(torch.linalg.matrix_norm(layer.dense_weight().detach(), ord=2))
    assert 0.2 < norm < 2 ** (1 + max(len(term.factors) for term in layer.structure.terms))


def with_a_budget() -> list[tuple[str, dict[str, Any], str]]:
    """The samples of families that can spend one: the family, the other arguments, and the one that spends."""
    found = []
    for name, arguments in map(parse_family, (spec for specs in SAMPLES.values() for spec in specs)):
        knob = next((k for k in ("rank", "blocks") if k in FAMILIES[name].defaults), None)
        case = (name, {k: v for k, v in arguments.items() if k != knob}, knob)
        if knob is not None and case not in found:
            found.append(case)
    return found


@pytest.mark.parametrize(("family", "others", "knob"), with_a_budget())
def test_a_budget_buys_the_richest_member(family: str, others: dict[str, Any], knob: str) -> None:
    members: dict[int, Structure] = {}
    for value in range(1, 40):
        with suppress(DoesNotFit):
            members[value] = el.structure(family, 512, 1024, **others, **{knob: value})
    richest = max if knob == "rank" else min
    budgets = [m.macs for value, m in members.items() if value < 20 and m.macs <= 512 * 1024]
    assert budgets
    for budget in budgets:
        best = richest(value for value, member in members.items() if member.macs <= budget)
        assert el.structure(family, 512, 1024, max_macs=budget / (512 * 1024), **others) == members[best]
