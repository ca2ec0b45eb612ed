"""Muon of products: what it does to W = B A does not depend on how the factors share it."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import einlinear as el
from einlinear.mup import Muon
from einlinear.mup.muon import _root, orthogonalised

# two terms, one of them a full matrix
MIXED = "i, r i, o r -> o + i, o i -> o where r=3"
STRUCTURES = ["btt", "btt(rank=2)", "low_rank(rank=4)", "kronecker", "tt(rank=2)", "monarch(blocks=2)", MIXED]
# with axes of every kind: g only in the input, f only in the output, c in both, r and s inner
GENERAL = "(c g a), r c g a f s, s e c r f g -> (c f e) where c=2, g=2, f=2, r=2, s=2"


def muon_of(model: nn.Module, lr: float, product: bool = True, **options: Any) -> Muon:
    return Muon(el.param_groups(model, lr, base=None, optimizer="muon", product=product, **options))


def trajectory(model: nn.Sequential, steps: int = 6, lr: float = 0.01, **options: Any) -> list[Tensor]:
    """The matrices of the first layer after every step of a regression."""
    x, y = (torch.randn(16, 16, dtype=torch.float64, generator=generator(seed)) for seed in (1, 2))
    muon, found = muon_of(model, lr, weight_decay=0.1, **options), []
    for _ in range(steps):
        model.zero_grad()
        (model(x) - y).square().mean().backward()
        muon.step()
        found.append(dense(model[0]))
    return found


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense(layer: Any) -> Tensor:
    with torch.no_grad():
        return layer(torch.eye(layer.in_features, dtype=layer.A.dtype)) - layer(layer.A.new_zeros(1, layer.in_features))


def network(structure: str, zero: bool = False) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(el.Linear(16, 16, structure), nn.Tanh(), el.Linear(16, 16, structure)).double()
    if zero:
        for _, factors in model[0].structure.by_term(model[0].weight_parameters()):
            if len(factors) == 2:
                nn.init.zeros_(factors[1])
    return model


@torch.no_grad()
def rescale(layer: Any, c: float) -> None:
    for _, factors in layer.structure.by_term(layer.weight_parameters()):
        if len(factors) == 2:
            factors[0].mul_(c)
            factors[1].div_(c)


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest one, relative to how far the matrix has moved."""
    moved = float((expected[-1] - expected[0]).norm())
    return max(float((a - b).norm()) for a, b in zip(found, expected, strict=True)) / moved


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("structure", [*STRUCTURES, GENERAL])
def test_the_scale_of_factors_does_not_matter(structure: str, zero: bool) -> None:
    model, rescaled = network(structure, zero), network(structure, zero)
    rescale(rescaled[0], 10)
    rescale(rescaled[2], 1 / 10)
    expected = trajectory(model)
    assert difference(trajectory(rescaled), expected) < 1e-10
    model, rescaled = network(structure, zero), network(structure, zero)
    rescale(rescaled[0], 10)
    assert difference(trajectory(rescaled, product=False), trajectory(model, product=False)) > 0.1


MIXINGS = [  # factors, mixed by M and by its transposed inverse
    ("btt(rank=3)", "gfrs, gsfa -> grfa", "gfrs, fegs -> fegr"),
    ("low_rank(rank=4)", "rs, si -> ri", "rs, os -> or"),
    ("tt(rank=2)", "rs, dsa -> dra", "rs, esb -> erb"),
]


@pytest.mark.parametrize(("structure", "first", "second"), MIXINGS)
@pytest.mark.parametrize("zero", [False, True])
def test_the_basis_of_inner_axes_does_not_matter(structure: str, first: str, second: str, zero: bool) -> None:
    model, mixed = network(structure, zero), network(structure, zero)
    layer = mixed[0]
    size = layer.structure.factors[0]
    sizes = dict(zip(size.axes, size.shape, strict=True))
    matrix = torch.randn(
        [sizes[axis] for axis in first.split(",")[0].replace("s", "r")], dtype=torch.float64, generator=generator(3)
    )
    with torch.no_grad():
        layer.A.copy_(torch.einsum(first.replace(" ", ""), matrix, layer.A))
        layer.B.copy_(torch.einsum(second.replace(" ", ""), torch.linalg.inv(matrix).mT, layer.B))
    torch.testing.assert_close(dense(layer), dense(model[0]))
    assert difference(trajectory(mixed), trajectory(model)) < 1e-8


def test_one_factor_moves_by_the_steepest_descent() -> None:
    """Against the polar factor of B, by a singular value decomposition."""
    torch.manual_seed(0)
    layer = el.Linear(12, 20, "low_rank(rank=4)", bias=False).double()
    layer.B.requires_grad_(False)
    before = dense(layer).T
    muon = muon_of(layer, lr=1e-4)
    gradient = torch.randn(20, 12, dtype=torch.float64)
    (layer.B @ layer.A * gradient).sum().backward()
    muon.step()
    u, _, v = torch.linalg.svd(layer.B, full_matrices=False)
    polar = u @ v
    step = polar @ orthogonalised((polar.T @ gradient)[None])[0]
    torch.testing.assert_close(dense(layer).T - before, -1e-4 * 0.2 * math.sqrt(20) / 2 * step, rtol=1e-4, atol=1e-9)
    assert layer.B.grad is None


def moved(layer: Any, lr: float, gradient: Tensor, **options: Any) -> Tensor:
    """How a step on this gradient of W moves W."""
    before = dense(layer)
    muon = muon_of(layer, lr, **options)
    layer.zero_grad()
    inputs = torch.eye(layer.in_features, dtype=layer.A.dtype)
    (layer(inputs) * gradient.to(layer.A.dtype)).sum().backward()
    muon.step()
    return dense(layer) - before


@pytest.mark.parametrize("structure", [*STRUCTURES[:-1], GENERAL])
@pytest.mark.parametrize("aligned", [False, True])
def test_a_step_has_the_spectral_norm_of_a_dense_one(structure: str, aligned: bool) -> None:
    torch.manual_seed(0)
    n_in, n_out = 64, 128
    layer = el.Linear(n_in, n_out, structure, bias=False)
    if aligned:
        # all blocks of a factor are equal, so that their steps add up
        nn.init.constant_(layer.A, 0.3)
        nn.init.constant_(layer.B, 0.3)
        gradient = torch.ones(n_in, n_out)
    else:
        gradient = torch.randn(n_in, n_out)
    size = 1e-4 * 0.2 * math.sqrt(n_out)
    norm = float(torch.linalg.matrix_norm(moved(layer, 1e-4, gradient), 2)) / size
    assert 0.2 < norm < 1.25


def test_a_zero_factor_waits_for_nothing() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(16, 16)
    for name, other in ("BA", "AB"):
        layer = el.Linear(16, 16, "btt(rank=2)", bias=False)
        nn.init.zeros_(layer.get_parameter(name))
        before = layer.get_parameter(other).detach().clone()
        step = moved(layer, 0.01, gradient)
        assert torch.equal(layer.get_parameter(other), before)
        norm = float(torch.linalg.matrix_norm(step, 2)) / (0.01 * 0.2 * 4)
        assert 0.2 < norm < 0.65
        # then both move, no farther together than half a dense step each, and their product
        norm = float(torch.linalg.matrix_norm(moved(layer, 0.01, gradient), 2)) / (0.01 * 0.2 * 4)
        assert 0.4 < norm < 1.8
        assert not torch.equal(layer.get_parameter(other), before)
    for factor in (layer.A, layer.B):
        nn.init.zeros_(factor)
    assert not moved(layer, 0.01, gradient).any()


@pytest.mark.parametrize("structure", ["btt(rank=2)", "low_rank(rank=4)", "kronecker"])
@pytest.mark.parametrize("small", [1e-2, 1e-8])
def test_a_step_from_a_small_matrix_is_no_larger(structure: str, small: float) -> None:
    torch.manual_seed(0)
    layer = el.Linear(16, 16, structure, bias=False)
    with torch.no_grad():
        layer.B.mul_(small)
    norm = float(torch.linalg.matrix_norm(moved(layer, 0.1, torch.randn(16, 16)), 2)) / (0.1 * 0.2 * 4)
    assert 0.2 < norm < 1.8


def feature_update(structure: str, n_in: int, n_out: int, zero: bool, batch: int = 4) -> float:
    """The root mean square of the change of features in a step, averaged over steps, over the one expected of dense."""
    torch.manual_seed(0)
    layer = el.Linear(n_in, n_out, structure, bias=False)
    if zero:
        nn.init.zeros_(layer.weight_parameters()[-1])
    x, y, head = torch.randn(batch, n_in), torch.randn(batch, 8), torch.randn(8, n_out) / n_out
    groups = el.param_groups(layer, 0.02, base=nn.Linear(64, 64), optimizer="muon", product=True)
    muon, changes = Muon(groups), []
    for _ in range(6):
        muon.zero_grad()
        h = layer(x)
        (h @ head.T * y).mean().backward()
        muon.step()
        changes.append(float((layer(x) - h).detach().square().mean().sqrt()))
    return sum(changes[2:]) / 4 / (0.02 * 0.2 * 8)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("structure", ["btt", "btt(rank=8)", "low_rank(rank=8)", "kronecker", "monarch(blocks=4)"])
def test_features_change_equally_at_every_width(structure: str, zero: bool) -> None:
    updates = [feature_update(structure, n, n, zero) for n in (64, 256, 1024)]
    assert max(updates) < 1.5 * min(updates)
    assert 0.3 < min(updates) < max(updates) < 1.3


@pytest.mark.parametrize("zero", [False, True])
def test_features_change_equally_at_every_rank_and_aspect(zero: bool) -> None:
    by_rank = [feature_update(f"btt(rank={rank})", 256, 256, zero) for rank in (1, 2, 4, 8)]
    assert max(by_rank) < 1.5 * min(by_rank)
    sizes = ((256, 256), (64, 1024), (1024, 64))
    by_aspect = [feature_update("btt", n_in, n_out, zero) for n_in, n_out in sizes]
    assert max(by_aspect) < 1.5 * min(by_aspect)


def test_layers_of_a_group_do_not_affect_each_other() -> None:
    together, apart = network("btt(rank=2)"), network("btt(rank=2)")
    with torch.no_grad():
        for model in (together, apart):
            # its blocks are aligned, so that its norm is larger
            model[2].B.fill_(0.3)
    found = trajectory(together)
    # other rates, if hardly, are other groups
    expected = trajectory(apart, lr_scale={"0": 1.0, "2": 1.0 + 1e-15})
    groups = el.param_groups(together, 0.1, base=None, optimizer="muon", product=True)
    assert [g["param_names"] for g in groups if "gram_views" in g] == [["0.A", "0.B", "2.A", "2.B"]]
    assert difference(found, expected) < 1e-10


def test_experts_are_matrices_of_their_own() -> None:
    torch.manual_seed(0)
    moe = el.MoELinear(16, 16, "btt(rank=2)", experts=3)
    # of one the blocks are aligned, so that its norm is larger
    moe.B.data[1] = 0.3
    gradients = [torch.randn(p.shape) for p in (moe.A, moe.B)]
    layers = [el.Linear(16, 16, "btt(rank=2)") for _ in range(3)]
    for p, gradient in zip((moe.A, moe.B), gradients, strict=True):
        p.grad = gradient
    for i, layer in enumerate(layers):
        for p, stack, gradient in zip((layer.A, layer.B), (moe.A, moe.B), gradients, strict=True):
            p.data.copy_(stack[i])
            p.grad = gradient[i].clone()
        muon_of(layer, 0.01).step()
    muon_of(moe, 0.01).step()
    for i, layer in enumerate(layers):
        torch.testing.assert_close(moe.A[i], layer.A)
        torch.testing.assert_close(moe.B[i], layer.B)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 0.9999), (torch.bfloat16, 0.99)])
def test_low_precision(dtype: torch.dtype, limit: float) -> None:
    torch.manual_seed(0)
    layer, gradient = el.Linear(64, 64, "btt(rank=2)", bias=False), torch.randn(64, 64)
    exact = copy.deepcopy(layer).double()
    layer = layer.to(dtype)
    # large steps, of which bfloat16 has a few digits
    found, expected = (moved(one, 0.3, gradient).flatten().double() for one in (layer, exact))
    assert float(torch.cosine_similarity(found, expected, dim=0)) > limit
    assert layer.A.dtype == dtype


@pytest.mark.parametrize("structure", ["btt(rank=9)", "low_rank(rank=20)"])
def test_ranks_above_the_other_axes(structure: str) -> None:
    """Their Gram matrices are singular: what one factor ignores must not grow in the other."""
    torch.manual_seed(0)
    layer, x, y = el.Linear(16, 16, structure, bias=False), torch.randn(64, 16), torch.randn(64, 16)
    muon = muon_of(layer, 0.01)
    for _ in range(150):
        muon.zero_grad()
        (layer(x) - y).square().mean().backward()
        before = dense(layer)
        muon.step()
        assert 0.2 < float(torch.linalg.matrix_norm(dense(layer) - before, 2)) / (0.01 * 0.2 * 4) < 1.5
    assert max(float(p.detach().abs().max()) for p in layer.parameters()) < 8


def test_state_dicts() -> None:
    whole, stopped = network("btt(rank=2)"), network("btt(rank=2)")
    x = torch.randn(16, 16, dtype=torch.float64, generator=generator(1))

    def step(model: nn.Module, muon: torch.optim.Optimizer, times: int) -> None:
        for _ in range(times):
            muon.zero_grad()
            model(x).square().mean().backward()
            muon.step()

    step(whole, muon_of(whole, 0.01), 6)
    first = muon_of(stopped, 0.01)
    step(stopped, first, 3)
    again = muon_of(stopped, 0.3)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    step(stopped, again, 3)
    for p, q in zip(whole.parameters(), stopped.parameters(), strict=True):
        assert torch.equal(p, q)


def test_groups() -> None:
    model = nn.ModuleDict({"a": el.Linear(64, 64, MIXED), "b": nn.Linear(64, 32), "c": el.Linear(32, 32, "dyad")})
    groups = el.param_groups(model, 0.1, base=None, optimizer="muon", product=True, lr_scale={"a.*": 2.0})
    by_name = {tuple(g["param_names"]): g for g in groups}
    product = by_name["a.A", "a.B"]
    assert product["gram_views"] == (((0, 1), 3, 64), ((1, 0), 3, 64))
    assert product["matrix_view"] == (((0, 1), 3, 64), ((0, 1), 64, 3))
    assert product["lr_mult"] == 1.0  # 2 / 2
    plain = el.param_groups(model, 0.1, base=None, optimizer="muon", lr_scale={"a.*": 2.0})
    matrices = {name: g["lr_mult"] for g in plain for name in g["param_names"]}
    for names, group in by_name.items():
        if "gram_views" not in group:
            assert [matrices[name] for name in names] == [group["lr_mult"]] * len(names)


def shared_factor() -> nn.Module:
    model = nn.ModuleList([el.Linear(16, 16, "btt"), el.Linear(16, 16, "btt")])
    model[1].A = model[0].A
    return model


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (lambda: el.Linear(16, 16, "btt"), {"optimizer": "adamw"}, "product=True is for Muon, but the optimizer is"),
        (lambda: el.Linear(27, 27, "btt(cores=3)"), {}, "terms of two factors; A belongs to one of more. Leave"),
        (lambda: el.Linear(16, 16, "btt"), {"hidden": "A"}, "together, not A alone: hidden= and lr_scale= must"),
        (lambda: el.Linear(16, 16, "btt"), {"lr_scale": {"B": 2.0}}, "together, not A alone"),
        (shared_factor, {}, "together, not 1.B alone"),
    ],
)
def test_errors(build: Callable[[], nn.Module], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        el.param_groups(build(), 0.1, base=None, **{"optimizer": "muon", "product": True, **options})


def test_a_gram_matrix_that_rounding_has_made_indefinite() -> None:
    grams = torch.tensor([[[4.0, 2.0], [2.0, 4.0]], [[1.0, 2.0], [2.0, 3.0]], [[0.0, 0.0], [0.0, 0.0]]])
    roots = _root(grams, is_singular=False)
    torch.testing.assert_close(roots[0] @ roots[0].T, grams[0])
    torch.testing.assert_close(roots[1], math.sqrt(2) * torch.eye(2))
    assert torch.equal(roots[2], torch.eye(2))


def test_weights_that_are_not_finite_stay_so() -> None:
    layer = el.Linear(16, 16, "btt", bias=False)
    nn.init.constant_(layer.A, math.nan)
    assert moved(layer, 0.01, torch.randn(16, 16)).isnan().all()
