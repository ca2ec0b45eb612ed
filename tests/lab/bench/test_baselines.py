"""The baselines compute the same matrix: forward, and the gradients in their own layouts."""

from __future__ import annotations

import pytest
import torch
from tests.families import PATTERNS, SAMPLES, structures
from tests.lab.data.samples import needs

import einlinear as el
from einlinear import ops
from einlinear_lab.bench import baselines

SPECS = [spec for specs in SAMPLES.values() for spec in specs] + PATTERNS
SIZES = [(16, 16), (48, 36), (12, 47), (97, 64), (8, 7)]  # primes are padded


@pytest.mark.parametrize("spec", SPECS)
def test_the_copying_baseline_is_the_dense_matrix(spec: str) -> None:
    for s in structures(spec, SIZES):
        torch.manual_seed(0)
        factors = [torch.randn(f.shape, dtype=torch.float64, requires_grad=True) for f in s.factors]
        x = torch.randn(5, s.in_features, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(s.out_features, dtype=torch.float64, requires_grad=True)
        grad = torch.randn(5, s.out_features, dtype=torch.float64)
        expected = x @ ops.dense_weight(s, factors).T + bias
        weights = [w.detach().requires_grad_() for w in baselines.copying_weights(s, factors)]
        y = baselines.copying(s, weights, x, bias)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        found = torch.autograd.grad(y, [x, bias, *weights], grad)
        wanted_x, wanted_bias, *wanted = torch.autograd.grad(expected, [x, bias, *factors], grad)
        for f, w in zip(found, [wanted_x, wanted_bias, *baselines.copying_weights(s, wanted)], strict=True):
            torch.testing.assert_close(f, w, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spec", ["btt", "btt(rank=2)", "monarch", "kronecker", "tt(rank=3)"])
def test_the_copying_baseline_copies_the_intermediate_and_the_output(spec: str) -> None:
    s = el.structure(spec, 64, 64)
    weights = baselines.copying_weights(s, [torch.randn(f.shape) for f in s.factors])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        baselines.copying(s, weights, torch.randn(4, 64))
    calls = {event.key: event.count for event in profiler.key_averages()}
    assert calls["aten::copy_"] == 2


@pytest.mark.parametrize("spec", ["kronecker", "tt(rank=3)", "(b a), r d s a, e s b r -> (e d) where r=2, s=3"])
def test_the_weights_of_blocktt(spec: str) -> None:
    s = el.structure(spec, 48, 36)
    assert baselines.is_blocktt(s)
    factors = [torch.randn(f.shape, dtype=torch.float64) for f in s.factors]
    slow, fast = baselines.blocktt_weights(s, factors)
    weight = torch.einsum("xebr,rday->edba", slow, fast).reshape(36, 48)
    torch.testing.assert_close(weight, ops.dense_weight(s, factors), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spec", ["dense", "btt", "monarch", "low_rank", "dyad", "tt(cores=3)"])
def test_others_are_no_blocktt(spec: str) -> None:
    assert not baselines.is_blocktt(el.structure(spec, 64, 64))


def test_blocktt_does_not_pad() -> None:
    assert not baselines.is_blocktt(el.structure("tt", 97, 64))


@needs("tltorch")
def test_the_layer_of_tensorly_torch() -> None:
    s = el.structure("tt(rank=3)", 48, 36)
    factors = [torch.randn(f.shape) for f in s.factors]
    bias = torch.nn.Parameter(torch.randn(36))
    weights = [torch.nn.Parameter(w.contiguous()) for w in baselines.blocktt_weights(s, factors)]
    x = torch.randn(5, 48)
    expected = x @ ops.dense_weight(s, factors).T + bias
    torch.testing.assert_close(baselines.blocktt(weights, bias)(x), expected, rtol=1e-4, atol=1e-4)
