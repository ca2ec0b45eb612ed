"""Projection: exact where a matrix has the structure, the best where that is known, never worse than descent."""

from __future__ import annotations

import pytest
import torch
from tests.families import PATTERNS, SAMPLES
from torch import Tensor

import einlinear as el
from einlinear import ops
from einlinear.ops.projection import als, svd
from einlinear.structures import Structure
from einlinear.structures.initialization import init_std

SPECS = [spec for specs in SAMPLES.values() for spec in specs]
CLOSED = [spec for spec in SPECS if not spec.startswith("blast")]


def factors_of(s: Structure, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(f.shape, dtype=dtype, generator=generator) for f in s.factors]


def error(s: Structure, w: Tensor, factors: list[Tensor] | None = None) -> float:
    factors = ops.project(s, w) if factors is None else factors
    return float((ops.dense_weight(s, factors) - w).norm() / w.norm())


SQUARE_ONLY = "(b a), d a, e b -> (e d) + i, i -> i"


@pytest.mark.parametrize(
    ("spec", "in_features", "out_features"),
    [
        (spec, *features)
        for spec in CLOSED + PATTERNS
        for features in [(16, 16), (24, 36), (36, 24), (31, 47)]
        if spec != SQUARE_ONLY or features == (16, 16)
    ],
)
def test_recovers_a_matrix_of_the_structure(spec: str, in_features: int, out_features: int) -> None:
    s = el.structure(spec, in_features, out_features)
    w = ops.dense_weight(s, factors_of(s))
    factors = ops.project(s, w)
    several = len(s.terms) > 1 and any(len(term.factors) > 1 for term in s.terms)  # no closed form
    assert error(s, w, factors) < (1e-2 if several else 1e-10)
    factors[0] = factors[0] + 0.01 * torch.randn_like(factors[0])
    assert error(s, w, factors) > 1e-4  # the check can fail


@pytest.mark.parametrize("spec", ["blast(blocks=2, rank=3)", "blast(blocks=4, rank=2)"])
def test_recovers_blast_to_one_percent(spec: str) -> None:
    s = el.structure(spec, 16, 24)
    assert error(s, ops.dense_weight(s, factors_of(s))) < 1e-2


@pytest.mark.parametrize(("in_features", "out_features"), [(20, 30), (30, 20)])
def test_low_rank_is_the_truncated_svd(in_features: int, out_features: int) -> None:
    w = torch.randn(out_features, in_features, dtype=torch.float64)
    u, s, v = torch.linalg.svd(w)
    layer = el.Linear.from_dense(w, "low_rank(rank=5)")
    torch.testing.assert_close(layer.dense_weight(), u[:, :5] * s[:5] @ v[:5])


@pytest.mark.parametrize("r", [1, 2])
def test_btt_is_the_svd_of_every_block(r: int) -> None:
    w = torch.randn(36, 64, dtype=torch.float64)
    layer = el.Linear.from_dense(w, f"btt(rank={r})")
    n = dict(layer.structure.sizes)
    blocks = w.view(n["f"], n["e"], n["g"], n["a"]).transpose(1, 2)
    u, s, v = torch.linalg.svd(blocks, full_matrices=False)
    best = (u[..., :r] * s[..., None, :r]) @ v[..., :r, :]
    torch.testing.assert_close(layer.dense_weight(), best.transpose(1, 2).reshape(36, 64))


def test_monarch_is_the_svd_of_every_residue() -> None:
    w = torch.randn(32, 64, dtype=torch.float64)
    layer = el.Linear.from_dense(w, "monarch(blocks=4)")
    blocks = w.view(8, 4, 4, 16).permute(1, 2, 0, 3)  # (f, g, e, a)
    u, s, v = torch.linalg.svd(blocks, full_matrices=False)
    best = (u[..., :2] * s[..., None, :2]) @ v[..., :2, :]
    torch.testing.assert_close(layer.dense_weight(), best.permute(2, 0, 1, 3).reshape(32, 64))


@pytest.mark.parametrize("variant", ["it", "ot", "dt"])
def test_dyad_is_the_least_squares_solution(variant: str) -> None:
    s = el.structure("dyad", 16, 16, variant=variant)
    w = torch.randn(16, 16, dtype=torch.float64)
    columns = []
    for index, factor in enumerate(s.factors):
        for entry in torch.eye(factor.params, dtype=torch.float64):
            units = [torch.zeros(f.shape, dtype=torch.float64) for f in s.factors]
            units[index] = entry.view(factor.shape)
            columns.append(ops.dense_weight(s, units).flatten())
    design = torch.stack(columns, 1)
    best = design @ torch.linalg.lstsq(design, w.flatten(), driver="gelsd").solution
    torch.testing.assert_close(ops.dense_weight(s, ops.project(s, w)).flatten(), best)


@pytest.mark.parametrize("spec", CLOSED)
def test_never_worse_than_200_restarts_of_gradient_descent(spec: str) -> None:
    """All restarts at once, by vmap over the factors; Adam with a decaying step, then compared."""
    features = 16 if spec == "monarch" else 8  # its four blocks need 16
    s = el.structure(spec, features, features)
    torch.manual_seed(0)
    w = torch.randn(features, features, dtype=torch.float64)
    starts = [torch.randn(200, *f.shape, dtype=torch.float64) / f.fan_in**0.5 for f in s.factors]
    for factor in starts:
        factor.requires_grad_()
    optimizer = torch.optim.Adam(starts, lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    residuals = torch.func.vmap(lambda *factors: (ops.dense_weight(s, factors) - w).square().sum())
    for _ in range(300):
        optimizer.zero_grad()
        squares = residuals(*starts)
        squares.sum().backward()
        optimizer.step()
        schedule.step()
    best = float(squares.detach().min().sqrt() / w.norm())
    assert error(s, w) <= best * (1 + 1e-6)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("knows_inputs", [False, True])
def test_factors_of_a_term_are_equally_far_from_new_ones(spec: str, knows_inputs: bool) -> None:
    s = el.structure(spec, 24, 36)
    w = torch.randn(36, 24, dtype=torch.float64)
    moment = torch.diag(torch.logspace(-2, 2, 24, dtype=torch.float64)) if knows_inputs else None
    factors = ops.project(s, w, moment, steps=3)
    sizes = [float(f.square().mean().sqrt()) / std for f, std in zip(factors, init_std(s), strict=True)]
    for _, own in s.by_term(sizes):
        assert own == pytest.approx([own[0]] * len(own), rel=1e-5)


def test_ranks_that_a_matrix_cannot_have_stay_trainable() -> None:
    """Blocks of 4 x 4 have rank 4 at most: the other two are zero in one factor, but not in both."""
    s = el.structure("btt(rank=6)", 16, 16)
    w = torch.randn(16, 16, dtype=torch.float64)
    factors = [factor.requires_grad_() for factor in ops.project(s, w)]
    found = ops.dense_weight(s, factors)
    torch.testing.assert_close(found, w)
    gradients = torch.autograd.grad(found, factors, torch.randn_like(w))
    reached = torch.zeros(6, dtype=torch.bool)
    for factor, gradient in zip(s.factors, gradients, strict=True):
        reached |= gradient.movedim(factor.axes.index("r"), 0).flatten(1).any(1)
    assert reached.all()


def test_blast_of_a_rank_beyond_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too large for random starts: what successive SVDs leave at zero must come to life (0.51 if it does not)."""
    monkeypatch.setattr(als, "_sweeps", lambda w: 20)
    s = el.structure("blast(blocks=8, rank=48)", 256, 272)
    assert error(s, ops.dense_weight(s, factors_of(s, dtype=torch.float32))) < 0.4


def test_large_matrices_take_fewer_sweeps() -> None:
    assert [als._sweeps(torch.empty(n, n, device="meta")) for n in (64, 512, 1024, 2048, 4096)] == [
        300,
        300,
        75,
        20,
        20,
    ]


def test_dtype_and_mistakes() -> None:
    s = el.structure("btt", 16, 16)
    w = torch.randn(16, 16, dtype=torch.bfloat16)
    assert {factor.dtype for factor in ops.project(s, w)} == {torch.bfloat16}
    assert not any(
        bool(factor.any()) for factor in ops.project(el.structure("tt(cores=3)", 16, 16), torch.zeros(16, 16))
    )
    for wrong in (torch.nan, torch.inf):
        w[3, 5] = wrong
        with pytest.raises(ValueError, match="the weight has values that are NaN or infinite"):
            ops.project(s, w)
        with pytest.raises(ValueError, match="the weight has values that are NaN or infinite"):
            el.Linear.from_dense(w, "dense")
    with pytest.raises(ValueError, match=r"the weight has shape \(16, 12\), the structure \(16, 16\) \(out, in\)"):
        ops.project(s, torch.randn(16, 12))


@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("shape", [(48, 80), (80, 48)])
@pytest.mark.parametrize("rank", [1, 7, 40, 48])
@pytest.mark.parametrize("panel", [20, 512])
def test_truncation_in_float32_is_as_good_as_the_svd(
    monkeypatch: pytest.MonkeyPatch, panel: int, decay: float, shape: tuple[int, int], rank: int
) -> None:
    """Also of singular values that fall by orders of magnitude, which a Gram matrix squares."""
    monkeypatch.setattr(svd, "_PANEL", panel)
    threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(20, n, 48, dtype=torch.float64, generator=generator))[0] for n in shape)
    values = torch.arange(1, 49, dtype=torch.float64) ** -decay
    matrices = (u * values) @ v.mT
    first, second = svd.truncated(matrices.float(), rank)
    assert torch.get_num_threads() == threads
    assert first.shape == (20, shape[0], rank)
    torch.testing.assert_close(first.norm(dim=1), second.norm(dim=2))
    assert bool((first.norm(dim=1).diff(dim=1) <= 4e-6).all())  # the largest first; equal ones up to rounding
    best = values[rank:].square().sum().sqrt()
    found = (first.double() @ second.double() - matrices).flatten(1).norm(dim=1)
    assert float(found.max()) <= 1.001 * float(best) + 2e-6 * float(values.norm())


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_a_few_of_many_singular_vectors(monkeypatch: pytest.MonkeyPatch, decay: float) -> None:
    """LAPACK's way to find some eigenvectors misses some where values are equal, and makes them less orthogonal."""
    monkeypatch.setattr(svd, "_LARGE", 100)
    generator = torch.Generator().manual_seed(0)
    n, rank = 600, 37
    u, v = (torch.linalg.qr(torch.randn(k, n, dtype=torch.float64, generator=generator))[0] for k in (n, 1500))
    values = torch.arange(1, n + 1, dtype=torch.float64) ** -decay
    matrices = ((u * values) @ v.mT)[None]
    first, second = svd.truncated(matrices.float(), rank)
    assert first.shape == (1, n, rank)
    best = values[rank:].square().sum().sqrt()
    assert float((first.double() @ second.double() - matrices).norm()) == pytest.approx(float(best), rel=1e-5)
    monkeypatch.setattr(svd, "find_spec", lambda name: None)  # without scipy
    for found, plain in zip((first, second), svd.truncated(matrices.float(), rank), strict=True):
        assert float(found.norm()) == pytest.approx(float(plain.norm()), rel=1e-5)
