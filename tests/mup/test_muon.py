"""Muon: every matrix of every factor moves by an orthogonal step, as far as muP says."""

import copy
import math
import re
from typing import Any

import pytest
import torch
from tests.lab.training import toy
from torch import Tensor, nn

import einlinear as el
from einlinear.mup import Muon
from einlinear.mup.factor_multipliers import muon_multipliers
from einlinear.mup.muon import orthogonalised


@pytest.mark.parametrize("shape", [(5, 8, 20), (5, 20, 8), (1, 1, 6), (3, 1, 1)])
def test_singular_values_come_near_one(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalised(x)
    values = torch.linalg.svdvals(found)
    assert 0.65 < values.min() <= values.max() < 1.25
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    aligned = u.mT @ found @ v.mT
    assert (aligned - torch.diag_embed(aligned.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-4


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_updates_of_one_matrix_equal_those_of_torch() -> None:
    start = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    group = {"params": [ours], "matrix_view": ((0, 1), 8, 24), "update_scale": 1.0}
    optimizers = [Muon([group], lr=0.1, weight_decay=0.2), torch.optim.Muon([theirs], lr=0.1, weight_decay=0.2)]
    for step in range(5):
        gradient = torch.randn(8, 24, generator=torch.Generator().manual_seed(step + 1))
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=0)  # theirs computes in bfloat16
    assert (ours - start).abs().max() > 0.1


def step(layer: el.Linear, base: nn.Module, lr: float) -> dict[str, Tensor]:
    """How a step on random data moves the factors."""
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    layer(torch.randn(64, layer.in_features)).square().mean().backward()
    Muon([g for g in el.param_groups(layer, lr, base=base, optimizer="muon") if "matrix_view" in g]).step()
    return {name: p.detach() - before[name] for name, p in layer.named_parameters()}


@pytest.mark.parametrize(
    ("pattern", "as_blocks"),
    [  # of factors A and B, to (g, r f, a) and (f, e, g r)
        ("(g a), g r f a, f e g r -> (f e)", ("g r f a -> g (r f) a", "f e g r -> f e (g r)")),
        ("(g a), a g r f, r f g e -> (f e)", ("a g r f -> g (r f) a", "r f g e -> f e (g r)")),
    ],
)
def test_matrices_of_a_factor_are_orthogonalised_separately(pattern: str, as_blocks: tuple[str, str]) -> None:
    torch.manual_seed(0)
    # 24 = g a = 4 * 6 inputs; 30 = f e = 5 * 6 outputs: A maps a to (r f) for each g, B maps (g r) to e for each f
    sizes = {"g": 4, "a": 6, "f": 5, "e": 6, "r": 2}
    layer = el.Linear(24, 30, el.structure(pattern, 24, 30, sizes=sizes))
    moved = step(layer, nn.Linear(16, 20), lr=0.01)
    of_dense = 0.01 * 0.2 * math.sqrt(20)  # the base's spectral norm; its aspect is that of the layer
    for name, blocks, fan_out, fan_in in (("A", as_blocks[0], 10, 6), ("B", as_blocks[1], 6, 8)):
        matrices = rearranged(moved[name], blocks, sizes)
        assert matrices.shape[1:] == (fan_out, fan_in)
        values = torch.linalg.svdvals(matrices) / (of_dense * math.sqrt(fan_out / fan_in / (30 / 24)) / 2)
        assert 0.65 < values.min() <= values.max() < 1.25
    assert not moved["bias"].any()


def rearranged(x: Tensor, axes: str, sizes: dict[str, int]) -> Tensor:
    """As einops has it: "a b c -> c (a b)"."""
    before, after = axes.split(" -> ")
    assert list(x.shape) == [sizes[axis] for axis in before.split()]
    groups = re.findall(r"\(.*?\)|\w", after)
    x = torch.einsum(f"{before.replace(' ', '')}->{''.join(re.findall(r'[a-z]', after))}", x)
    return x.reshape([math.prod(sizes[axis] for axis in re.findall(r"\w", group)) for group in groups])


def test_updates_of_the_base_have_the_root_mean_square_of_adamw() -> None:
    torch.manual_seed(0)
    for features in ((32, 32), (16, 64), (64, 16)):
        moved = step(el.Linear(*features, "dense"), nn.Linear(*features), lr=0.01)["A"]
        assert moved.square().mean().sqrt().item() == pytest.approx(0.01 * 0.2, rel=0.2)


def by_name(groups: list[dict[str, Any]], key: str) -> dict[str, Any]:
    return {name: group[key] for group in groups for name in group["param_names"] if key in group}


def test_groups() -> None:
    model, base = toy.build(64, "btt"), toy.build(16, "dense")
    groups = el.param_groups(model, 0.1, base=base, optimizer="muon", hidden="blocks.*", weight_decay=0.3)
    rates, matrices = by_name(groups, "lr_mult"), by_name(groups, "matrix_view")
    assert set(matrices) == {name for name in rates if name.startswith("blocks") and name.endswith((".A", ".B"))}
    fc1 = dict(zip("AB", muon_multipliers(el.structure("btt", 64, 256)), strict=True))
    assert rates["blocks.0.fc1.A"] == pytest.approx(fc1["A"])  # 64 -> 256 has the aspect of the base's 16 -> 64
    adam = by_name(el.param_groups(model, 0.1, base=base), "lr_mult")
    assert {name: rate for name, rate in rates.items() if name not in matrices} == {
        name: rate for name, rate in adam.items() if name not in matrices
    }
    decays = by_name(groups, "weight_decay")
    assert decays["blocks.0.fc1.A"] * rates["blocks.0.fc1.A"] == pytest.approx(0.3 / 2)
    own = el.param_groups(toy.build(16, "dense"), 0.1, base=base, optimizer="muon")
    assert set(by_name(own, "lr_mult").values()) == {1.0}
    assert "head.weight" in by_name(own, "matrix_view")
    wide = by_name(el.param_groups(toy.build(64, "dense"), 0.1, base=base, optimizer="muon"), "lr_mult")
    assert wide["head.weight"] == pytest.approx(math.sqrt(1 / 4))
    assert wide["blocks.0.fc1.A"] == 1.0

    with pytest.raises(ValueError, match="hidden: 'block' matches no parameter"):
        el.param_groups(model, 0.1, base=base, optimizer="muon", hidden="block")
    with pytest.raises(ValueError, match="hidden names the matrices for Muon, but the optimizer is 'adamw'"):
        el.param_groups(model, 0.1, base=base, hidden="blocks.*")


def gpt() -> Any:
    return toy.initialised(toy.build_gpt, structure="btt(rank=2)")


def groups_of(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Groups of a model with hidden matrices, and with embeddings, norms and a head that AdamW takes."""
    options = {"optimizer": "muon", "hidden": "blocks.*", "weight_decay": 0.1, "eps": 1e-6, **options}
    return el.param_groups(model, 0.01, base=toy.build_gpt(16, "dense"), **options)


def two_optimizers(groups: list[dict[str, Any]], **adamw: Any) -> list[torch.optim.Optimizer]:
    matrices = [group for group in groups if "matrix_view" in group]
    rest = [group for group in groups if "matrix_view" not in group]
    return [Muon(matrices), torch.optim.AdamW(rest, betas=(0.8, 0.9), **adamw)]


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
    for step in steps:
        model.zero_grad()
        tokens = torch.randint(257, (4, 16), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("fused", [None, False, True])
def test_one_optimizer_moves_all_groups_as_muon_and_adamw(product: bool, fused: bool | None) -> None:
    one, two = gpt(), gpt()
    one.head.bias.requires_grad_(False)
    two.head.bias.requires_grad_(False)
    groups = groups_of(two, product=product)
    train(one, [Muon(groups_of(one, product=product), betas=(0.8, 0.9), fused=fused)], range(5))
    train(two, two_optimizers(groups, fused=fused), range(5))
    assert_equal(one, two)
    fresh = gpt()
    assert not torch.equal(one.embedding.weight, fresh.embedding.weight)
    assert torch.equal(one.head.bias, fresh.head.bias)


@pytest.mark.parametrize("fused", [None, True])
def test_it_resumes_from_its_state(fused: bool | None) -> None:
    whole, parts = gpt(), gpt()
    train(whole, [Muon(groups_of(whole), fused=fused)], range(6))
    first = Muon(groups_of(parts), fused=fused)
    train(parts, [first], range(3))
    again = Muon(groups_of(parts), lr=1.0, betas=(0.1, 0.1), fused=fused)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    el.check_groups(again, groups_of(parts))
    train(parts, [again], range(3, 6))
    assert_equal(whole, parts)


def test_a_scaler_of_gradients_unscales_them_once() -> None:
    scaled, plain = gpt(), gpt()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer, expected = Muon(groups_of(scaled), fused=True), Muon(groups_of(plain), fused=True)
    for model, scale in ((scaled, scaler.scale), (plain, lambda loss: loss)):
        scale(model(torch.arange(16)[None]).square().mean()).backward()  # type: ignore[no-untyped-call]
    scaler.step(optimizer)
    scaler.update()
    expected.step()
    assert_equal(scaled, plain)
    before = copy.deepcopy(scaled)
    scaled.head.A.grad.fill_(math.inf)
    scaler.step(optimizer)
    assert_equal(scaled, before)


def test_schedules_scale_all_groups() -> None:
    groups = groups_of(gpt())
    optimizer, rates = Muon(groups), [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, total_iters=2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5 * rate for rate in rates]
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.75 * rate for rate in rates])
