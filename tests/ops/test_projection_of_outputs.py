"""Projection that makes outputs closest: the optimum where it is known, never worse than what is simpler."""

from __future__ import annotations

import pytest
import torch
from tests.families import PATTERNS, SAMPLES
from torch import Tensor

import einlinear as el
from einlinear import ops
from einlinear.structures import Structure

SPECS = [spec for specs in SAMPLES.values() for spec in specs]


def correlated(features: int, seed: int = 0, tokens: int | None = None) -> Tensor:
    """The second moment of inputs whose directions differ a hundredfold in variance."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens or 4 * features, features, dtype=torch.float64, generator=generator)
    x = x * torch.logspace(-1, 1, features) @ torch.randn(features, features, dtype=torch.float64, generator=generator)
    return x.T @ x / len(x)


def error(s: Structure, w: Tensor, factors: list[Tensor], moment: Tensor) -> float:
    """E|(W - V) x|^2 over E|W x|^2."""
    difference = ops.dense_weight(s, factors) - w
    return float(((difference @ moment) * difference).sum() / ((w @ moment) * w).sum())


@pytest.mark.parametrize(("in_features", "out_features"), [(20, 30), (30, 20)])
def test_low_rank_is_the_truncated_svd_of_whitened_inputs(in_features: int, out_features: int) -> None:
    w, moment = torch.randn(out_features, in_features, dtype=torch.float64), correlated(in_features)
    s = el.structure("low_rank(rank=5)", in_features, out_features)
    discarded = torch.linalg.svdvals(w @ torch.linalg.cholesky(moment))[5:].square().sum()
    best = float(discarded / ((w @ moment) * w).sum())
    assert error(s, w, ops.project(s, w, moment), moment) == pytest.approx(best, rel=1e-4)
    assert error(s, w, ops.project(s, w), moment) > 1.5 * best


@pytest.mark.parametrize("spec", ["dyad", "dyad(variant='dt')", "block_diagonal(blocks=2)", "dense"])
def test_one_factor_terms_are_the_least_squares_solution(spec: str) -> None:
    s = el.structure(spec, 16, 16)
    w, moment = torch.randn(16, 16, dtype=torch.float64), correlated(16)
    root = torch.linalg.cholesky(moment)
    columns = []
    for index, factor in enumerate(s.factors):
        for entry in torch.eye(factor.params, dtype=torch.float64):
            units = [torch.zeros(f.shape, dtype=torch.float64) for f in s.factors]
            units[index] = entry.view(factor.shape)
            columns.append((ops.dense_weight(s, units) @ root).flatten())
    design = torch.stack(columns, 1)
    solution = torch.linalg.lstsq(design, (w @ root).flatten(), driver="gelsd").solution
    best = float((design @ solution - (w @ root).flatten()).square().sum() / (w @ root).square().sum())
    assert error(s, w, ops.project(s, w, moment), moment) == pytest.approx(best, rel=0.01, abs=1e-6)


@pytest.mark.parametrize("spec", SPECS + PATTERNS)
def test_outputs_are_closer_than_those_of_the_closest_weight(spec: str) -> None:
    s = el.structure(spec, 24, 36) if spec in SPECS else el.structure(spec, 16, 16)
    w = torch.randn(s.out_features, s.in_features, dtype=torch.float64)
    moment = correlated(s.in_features)
    plain, aware = ops.project(s, w), ops.project(s, w, moment)
    assert [f.shape for f in aware] == [torch.Size(f.shape) for f in s.factors]
    before, after = error(s, w, plain, moment), error(s, w, aware, moment)
    assert after <= before + 1e-9
    if before > 1e-6:
        assert after < 0.97 * before


@pytest.mark.parametrize("spec", ["btt(rank=2)", "monarch(blocks=2)", "kronecker", "tt(rank=2)"])
@pytest.mark.parametrize("features", [(24, 36), (23, 35)])
def test_white_inputs_ask_for_the_closest_weight(spec: str, features: tuple[int, int]) -> None:
    s = el.structure(spec, *features)
    w, white = torch.randn(features[1], features[0], dtype=torch.float64), torch.eye(features[0])
    expected = error(s, w, ops.project(s, w), white.double())
    assert error(s, w, ops.project(s, w, 3 * white), white.double()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("spec", ["low_rank(rank=4)", "btt(rank=2)", "monarch(blocks=2)", "blast(blocks=2, rank=4)"])
def test_singular_moments(spec: str) -> None:
    """Fewer tokens than features, and features that are always zero."""
    s = el.structure(spec, 24, 36)
    w, moment = torch.randn(36, 24, dtype=torch.float64), correlated(24, tokens=7)
    moment[3], moment[:, 3] = 0, 0
    factors = ops.project(s, w, moment)
    assert all(factor.isfinite().all() for factor in factors)
    assert error(s, w, factors, moment) < 0.9 * error(s, w, ops.project(s, w), moment)
    nothing = ops.project(s, w, torch.zeros(24, 24))
    assert torch.equal(ops.dense_weight(s, nothing), ops.dense_weight(s, ops.project(s, w)))


def test_blast_starts_from_the_low_rank_it_contains_and_goes_on() -> None:
    torch.manual_seed(0)
    w, moment = torch.randn(64, 64, dtype=torch.float64), correlated(64)
    low_rank, blast = (el.structure(spec, 64, 64) for spec in ("low_rank(rank=16)", "blast(blocks=4, rank=16)"))
    bound = error(low_rank, w, ops.project(low_rank, w, moment), moment)
    assert error(blast, w, ops.project(blast, w, moment, steps=1), moment) < bound
    assert error(blast, w, ops.project(blast, w, moment), moment) < 0.42 * bound


def test_float32_and_layers() -> None:
    linear = torch.nn.Linear(32, 48)
    moment = correlated(32).float()
    layer = el.Linear.from_dense(linear, "btt(rank=2)", moment)
    weight = linear.weight.detach().double()
    double = ops.project(layer.structure, weight, moment.double())
    factors = [factor.detach().double() for factor in layer.factors()]
    assert torch.equal(layer.get_parameter("bias"), linear.bias)
    found, best = (error(layer.structure, weight, f, moment.double()) for f in (factors, double))
    assert found == pytest.approx(best, rel=0.02)


def test_mistakes() -> None:
    s, w = el.structure("btt", 16, 16), torch.randn(16, 16)
    with pytest.raises(ValueError, match=r"the second moment has shape \(8, 8\), not \(16, 16\)"):
        ops.project(s, w, torch.eye(8))
    with pytest.raises(ValueError, match="the second moment has values that are NaN or infinite"):
        ops.project(s, w, torch.full((16, 16), torch.nan))
