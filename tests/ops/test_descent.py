"""The last factor that is solved for: it is optimal, and the error has the right gradient."""

from __future__ import annotations

import pytest
import torch
from tests.ops.test_projection_of_outputs import correlated

import einlinear as el
from einlinear import ops
from einlinear.ops.projection.weighted import _LastFactor, error_of

SPECS = ["btt(rank=2)", "btt(rank=2, cores=3)", "monarch(blocks=2)", "blast(blocks=2, rank=3)"]
WITH_COLUMNS = ["kronecker", "tt(rank=2)", "einsum(theta=(1/2, 1/4, 1/4, 1/4, 1/2, 1/4, 1/4))"]


@pytest.mark.parametrize(
    ("spec", "features"),
    [(spec, size) for spec in SPECS + WITH_COLUMNS for size in ((24, 36), (36, 24), (23, 36))]
    + [(spec, (23, 35)) for spec in SPECS],
)
def test_the_last_factor_is_the_best(spec: str, features: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("einlinear.ops.projection.weighted._CHEAP", 1000)
    s = el.structure(spec, *features)
    w, c = torch.randn(features[1], features[0], dtype=torch.float64), correlated(features[0])
    last = _LastFactor.of(s, w, c)
    assert last is not None
    others = [torch.randn(f.shape, dtype=torch.float64, requires_grad=True) for f in s.factors[:-1]]
    best = last.best(others)
    assert best.shape == torch.Size(s.factors[-1].shape)
    least = error_of(s, w, c, [*others, best])
    assert float(last.error(others).detach()) == pytest.approx(float(least.detach()), rel=1e-9)

    for size in (1e-3, -1e-3):
        moved = best + size * best.abs().mean() * torch.randn_like(best)
        assert error_of(s, w, c, [*others, moved]) > least

    direction = [torch.randn_like(other) for other in others]
    gradients = torch.autograd.grad(last.error(others), others)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
    step, ends = 1e-5, []
    for sign in (1, -1):
        there = [o.detach() + sign * step * d for o, d in zip(others, direction, strict=True)]
        ends.append(float(error_of(s, w, c, [*there, last.best(there)])))
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3)


def test_the_last_factor_is_searched_for_if_solving_is_expensive_or_undefined() -> None:
    w, c = torch.randn(64, 64), torch.eye(64)
    padded = el.structure("tt(rank=2)", 23, 37)
    assert _LastFactor.of(padded, torch.randn(37, 23), torch.eye(23)) is None
    for spec in ("dyad", "block_diagonal", "dense", "btt(rank=7)"):
        assert _LastFactor.of(el.structure(spec, 64, 64), w, c) is None


def test_equations_of_deficient_rank_are_solved() -> None:
    """Factors of zeros, and inputs of a single direction."""
    s = el.structure("monarch(blocks=2)", 16, 16)
    w, x = torch.randn(16, 16), torch.randn(16)
    moment = torch.outer(x, x)
    assert all(factor.isfinite().all() for factor in ops.project(s, w, moment))
    last = _LastFactor.of(s, w, moment)
    assert last is not None
    assert last.best([torch.zeros(s.factors[0].shape)]).isfinite().all()
