"""Width and rank for a budget."""

from __future__ import annotations

import os
import random
from fractions import Fraction

import optuna
import pytest
import torch
from optuna.samplers import RandomSampler

import einlinear as el
from einlinear.structures import DoesNotFit
from einlinear_lab.models import GPTConfig, MLPConfig, ModelConfig, Shape, ViTConfig
from einlinear_lab.search.matching import TOLERANCE, Matching, with_structures
from einlinear_lab.search.space import STRUCTURE, Proposal, Proposals, SearchSpace, Theta

IMAGE = Shape(784, 10, image=(1, 28, 28))
TEXT = Shape(0, 96, context=64)
DRAWS = int(os.environ.get("EINLINEAR_DRAWS", "120"))  # 10000: about ten minutes
KINDS: list[tuple[ModelConfig, Shape, int]] = [
    (MLPConfig(depth=2), IMAGE, 100_000),
    (MLPConfig(depth=2, input_structure="dense"), IMAGE, 200_000),
    (ViTConfig(heads=4), IMAGE, 6_000_000),
    (GPTConfig(heads=4, d_head=None), TEXT, 400_000),
]


def drawn(space: SearchSpace, draw: random.Random) -> Proposals:
    study = optuna.create_study(sampler=RandomSampler(draw.getrandbits(32)))
    return space.propose(study.ask(space.coordinates).params)


@pytest.mark.parametrize(("model", "shape", "budget"), KINDS)
def test_costs_are_those_of_the_model_that_is_built(model: ModelConfig, shape: Shape, budget: int) -> None:
    draw, matching = random.Random(0), Matching(model, shape, budget)
    roles = ("up", "attention_out") if isinstance(model, GPTConfig) else ("down",)
    for space in (SearchSpace(("einsum", "btt3")), SearchSpace(roles=roles)):
        for _ in range(4):
            found = matching.match(drawn(space, draw))
            with torch.device("meta"):
                built = with_structures(model, found.width, found.specs).build(shape)
            assert built.macs == found.macs
            assert abs(found.macs / budget - 1) <= TOLERANCE


def test_roles_get_structures_of_their_own() -> None:
    space, draw = SearchSpace(roles=("attention_in", "attention_out", "up", "down")), random.Random(0)
    found = Matching(GPTConfig(heads=4, d_head=None, head_structure="low_rank"), TEXT, 400_000)
    with pytest.raises(ValueError, match="no layer of model=gpt takes structure: name fewer roles"):
        found.match(drawn(space, draw))
    matched = found.match(drawn(SearchSpace(roles=("attention_in", "up", "down")), draw))
    assert len(set(matched.specs.values())) == 4
    with torch.device("meta"):
        built = with_structures(
            GPTConfig(heads=4, d_head=None, head_structure="low_rank"), matched.width, matched.specs
        ).build(TEXT)
    right = {"query": "attention_in", "key": "attention_in", "value": "attention_in", "fc1": "up", "fc2": "down"}
    for name, layer in built.blocks.named_modules():
        if isinstance(layer, el.Linear):
            role = right.get(name.rpartition(".")[-1])
            assert layer.structure.spec == matched.specs[f"{role}_structure" if role else "structure"]
    with pytest.raises(ValueError, match="roles must be some of attention_in, attention_out, up, down, not head"):
        SearchSpace(roles=("head",))


@pytest.mark.slow
def test_every_draw_costs_the_budget_and_computes_what_its_matrix_says() -> None:
    draw, matching = random.Random(1), Matching(MLPConfig(depth=1, expansion=2), Shape(96, 10), 100_000)
    checked = set[tuple[str, int, int]]()
    for _ in range(DRAWS):
        found = matching.match(drawn(SearchSpace(), draw))
        assert abs(found.macs / 100_000 - 1) <= TOLERANCE
        spec = found.specs[STRUCTURE]
        for _, (in_features, out_features, *_) in found.sizes:
            if (spec, in_features, out_features) not in checked:
                checked.add((spec, in_features, out_features))
                conforms(spec, in_features, out_features)
    assert len(checked) > DRAWS


@pytest.mark.parametrize(
    "theta",
    ["11/24, 0, 13/24, 5/12, 1/8, 11/24, 0", "1/12, 5/12, 1/2, 0, 7/12, 5/12, 1/12", "5/8, 0, 3/8, 5/8, 1/12, 7/24, 0"],
)
def test_costs_that_jump(theta: str) -> None:
    """Axes of small exponents have few sizes: where costs cross the budget no width fits, but elsewhere one does."""
    exponents = Theta(*map(Fraction, theta.split(",")))
    matching = Matching(MLPConfig(depth=1, expansion=2), Shape(96, 10), 100_000)
    found = matching.match({STRUCTURE: Proposal("einsum", exponents, rho=exponents.rho)})
    assert abs(found.macs / 100_000 - 1) <= TOLERANCE
    assert found.specs[STRUCTURE] == exponents.spec


def conforms(spec: str, in_features: int, out_features: int) -> None:
    """A layer's outputs and gradients are those of its dense matrix, which may have the rank that is said."""
    s = el.structure(spec, in_features, out_features)
    layer = el.Linear(in_features, out_features, s, bias=False, dtype=torch.float64)
    x = torch.randn(3, in_features, dtype=torch.float64, requires_grad=True)
    y, weight = layer(x), layer.dense_weight()
    torch.testing.assert_close(y, x @ weight.T)
    direction = torch.randn_like(y)
    (found,) = torch.autograd.grad((y * direction).sum(), x)
    torch.testing.assert_close(found, direction @ weight)
    assert sum(p.numel() for p in layer.parameters()) == s.params
    assert s.macs > 0


def test_the_same_sizes_are_the_same_model() -> None:
    matching = Matching(MLPConfig(depth=1), Shape(64, 10), 40_000)
    draw = random.Random(2)
    found = [matching.match(drawn(SearchSpace(), draw)) for _ in range(150)]
    by_sizes: dict[object, set[int]] = {}
    for own in found:
        by_sizes.setdefault(own.sizes, set()).add(own.macs)
    assert len(by_sizes) < len({own.specs[STRUCTURE] for own in found})  # some specs round to the same sizes
    assert all(len(macs) == 1 for macs in by_sizes.values())


def test_budgets_that_cannot_be_met() -> None:
    low_rank = {STRUCTURE: Proposal("low_rank", rho=None, arguments={"rank": 1})}
    for budget in (50, 10**15):
        with pytest.raises(DoesNotFit, match=rf"no low_rank\(rank=1\) is within 5% of {budget:,} MACs: "):
            Matching(MLPConfig(depth=2), IMAGE, budget).match(low_rank)
    with pytest.raises(DoesNotFit, match="it fits no width"):
        Matching(MLPConfig(depth=2), Shape(7, 3), 50_000).match({STRUCTURE: Proposal("monarch(blocks=6)")})


def test_widths_are_multiples_of_what_heads_ask_for() -> None:
    draw = random.Random(3)
    for model in (GPTConfig(heads=6, d_head=None), GPTConfig(d_head=16)):
        for _ in range(5):
            try:
                width = Matching(model, TEXT, 600_000).match(drawn(SearchSpace(), draw)).width
            except DoesNotFit:
                continue
            assert width % (6 if model.heads else 16) == 0
