"""Blocks with fewer inner features: which are found, which features are kept, and what the layers compute then."""

from __future__ import annotations

import copy
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import einlinear as el
from einlinear.compression.allocation import allocate
from einlinear.compression.calibration import InputStatistics
from einlinear.compression.candidates import LayerCandidate
from einlinear.compression.inner_features import InnerFeatures, find_inner_features
from einlinear.compression.narrowing import Removal, removal
from einlinear.compression.selection import select_layers
from einlinear.nn.quantized_linear import QuantizedLinear


class Attention(nn.Module):
    """As in timm: queries, keys and values of one layer, and a number of heads that the forward pass reads."""

    def __init__(self, width: int = 32, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = num_heads, width // num_heads, width
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, self.attn_dim)
        return self.proj(y)  # type: ignore[no-any-return]


class Gated(nn.Module):
    def __init__(self, width: int = 32, hidden: int = 96, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=bias) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Model(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches:
            x = x + branch(x)
        return x


def transformer(*others: nn.Module) -> Model:
    torch.manual_seed(0)
    return Model(Attention(), Gated(), Attention(), Gated(bias=True), *others).eval()


def inputs(batches: int = 4, width: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 12, width, generator=generator) for _ in range(batches)]


def blocks(model: nn.Module, data: list[Tensor]) -> list[InnerFeatures]:
    return find_inner_features(model, select_layers(model, None, data), data)


@torch.no_grad()
def change(model: nn.Module, original: nn.Module, x: Tensor) -> float:
    expected = original(x)
    return float((model(x) - expected).square().sum() / expected.square().sum())


def test_blocks_are_found_by_running_the_model() -> None:
    found = blocks(transformer(), inputs())
    assert [(inner.consumer, inner.size, inner.groups) for inner in found] == [
        ("branches.0.proj", 32, 4),
        ("branches.1.down", 96, 96),
        ("branches.2.proj", 32, 4),
        ("branches.3.down", 96, 96),
    ]
    assert found[0].producers == {"branches.0.qkv": (32, 32, 32)}
    assert found[0].attributes == {"branches.0": {"num_heads": 4, "attn_dim": 32}}
    assert found[0].outputs("branches.0.qkv", [1]) == [*range(8, 16), *range(40, 48), *range(72, 80)]
    assert [*found[1].producers] == ["branches.1.gate", "branches.1.up"]


class Normalized(Gated):
    """The norm makes every feature depend on all others."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.gate(x)) * self.up(x)
        return self.down(y / y.square().mean(-1, keepdim=True).sqrt())  # type: ignore[no-any-return]


class ReadTwice(Gated):
    """The hidden features are read by more than the consumer."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.gate(x)) * self.up(x)
        return self.down(y) * y.mean(-1, keepdim=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Normalized, ReadTwice])
def test_blocks_whose_features_depend_on_each_other_are_left_and_named(kind: type[Gated]) -> None:
    model = transformer(kind())
    assert len(blocks(model, inputs())) == 4
    report = el.compress(model, 0.8, ["narrow"], inputs())
    assert [name for name, _ in report.not_narrowed] == [f"branches.4.{name}" for name in ("gate", "up", "down")]
    sentence = "Not narrowed: branches.4.gate, branches.4.up, branches.4.down, in no block of which hidden features"
    assert sentence in str(report)


def test_chains_of_layers_are_divided_into_pairs() -> None:
    torch.manual_seed(0)
    sizes = (16, 40, 40, 40, 16)
    layers = [part for n, m in itertools.pairwise(sizes) for part in (nn.Linear(n, m), nn.Tanh())]
    found = blocks(nn.Sequential(*layers[:-1]), [torch.randn(64, 16)])
    assert [inner.layers for inner in found] == [("0", "2"), ("4", "6")]


@pytest.mark.parametrize(("size", "groups"), [(12, 12), (12, 4)])
def test_errors_are_those_of_the_least_squares_fit(size: int, groups: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(500, size, dtype=torch.float64) @ torch.randn(size, size, dtype=torch.float64)
    layer = nn.Linear(size, 7, bias=False).double()
    moment = x.T @ x / len(x)
    inner = InnerFeatures("", {"up": (size,)}, "down", size, groups, {}, removable=True)
    found = Removal.from_record(removal(layer, inner, InputStatistics.white(size, x.device), moment))
    assert sorted(found.order) == [*range(groups)]
    assert [*found.errors] == [*range(groups)][::-1]
    y = (x @ layer.weight.T).detach()

    def error(kept: tuple[int, ...]) -> float:
        z = x[:, inner.inputs(kept)]
        fit = z @ torch.linalg.lstsq(z, y).solution
        return float((y - fit).square().sum() / y.square().sum())

    for kept, expected in found.errors.items():
        assert error(found.kept(kept)) == pytest.approx(expected, rel=1e-6)
    # the first one removed is the best single one
    others = [error(tuple(j for j in range(groups) if j != i)) for i in range(groups)]
    assert min(others) == pytest.approx(found.errors[groups - 1], rel=1e-6)


def test_redundant_features_cost_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):
            tensor[32:] = 3 * tensor[:32]
    original, x = copy.deepcopy(model), torch.randn(4000, 16)
    report = el.compress(model, 0.5, ["narrow"], [x], damping=1e-6)
    assert [layer.structure for layer in report.layers] == ["narrow(32 of 64)"] * 2
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert (model[0].out_features, model[2].in_features) == (32, 32)
    assert change(model, original, x) < 1e-6


@pytest.mark.parametrize(
    ("count", "families"),
    [
        ("params", ["narrow"]),
        ("macs", ["narrow(uniform=True)"]),
        ("bytes", ["narrow"]),
        ("bytes", ["narrow(uniform=True)"]),
    ],
)
def test_the_budget_is_kept(count: str, families: list[str]) -> None:
    model, data = transformer(), inputs()
    original = copy.deepcopy(model)
    # fewer bytes than 2 bits an entry take
    budget = 0.06 if count == "bytes" else 0.6
    report = el.compress(model, budget, families, data, count=count)
    before = sum(p.nbytes for name, p in original.named_parameters() if "weight" in name)
    assert report.bytes_before == before
    stored = sum(t.nbytes for name, t in model.state_dict().items() if "bias" not in name)
    assert report.bytes == stored
    assert 0.8 * budget * before < stored <= budget * before
    assert 0 < change(model, original, data[0]) < (0.6 if count == "bytes" else 0.3)
    assert any(layer.structure.startswith("narrow") for layer in report.layers)
    if count != "bytes":
        assert not any(isinstance(module, el.Linear) for module in model.modules())
    if count == "bytes":
        assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    if "uniform" in families[0]:
        assert len({model.get_submodule(f"branches.{i}").num_heads for i in (0, 2)}) == 1
        assert len({model.get_submodule(f"branches.{i}.down").in_features for i in (1, 3)}) == 1


def correlated() -> list[Tensor]:
    return [x * torch.logspace(0.5, -1.5, 32) for x in inputs()]


def test_layers_are_fitted_to_the_outputs_of_the_narrow_ones_before() -> None:
    changes = []
    for sequential in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(*(Gated(bias=True) for _ in range(4)))
        for p in model.parameters():
            p.data *= 2
        original, data = copy.deepcopy(model), correlated()
        el.compress(model, 0.4, ["narrow"], data, sequential=sequential)
        changes.append(change(model, original, data[0]))
    assert changes[0] < 0.8 * changes[1]


def test_a_refit_is_better_than_rows_and_columns_alone() -> None:
    torch.manual_seed(0)
    model, data = Model(Gated(bias=True)).eval(), correlated()
    original = copy.deepcopy(model)
    report = el.compress(model, 0.5, ["narrow"], data, damping=1e-4)
    found = change(model, original, data[0])
    block: Any = model.branches[0]
    with torch.no_grad():
        rows = [int((original.branches[0].gate.weight - row).abs().sum(1).argmin()) for row in block.gate.weight]
        assert len({*rows}) == block.down.in_features
        block.down.weight.copy_(original.branches[0].down.weight[:, rows])
        block.down.bias.copy_(original.branches[0].down.bias)
    assert found < 0.3 * change(model, original, data[0])
    assert report.layers[-1].error == pytest.approx(report.layers[-1].expected_error, rel=0.2)


def test_a_block_may_be_removed_wholly_and_leaves_its_mean() -> None:
    torch.manual_seed(0)
    model = Model(Gated(bias=True), Gated(bias=True)).eval()
    with torch.no_grad():
        model.branches[0].down.weight.mul_(1e-4)
        model.branches[0].down.bias.add_(1)
    original, data = copy.deepcopy(model), inputs()
    report = el.compress(model, 0.5, ["narrow"], data)
    assert report.layers[0].structure == "narrow(0 of 96)"
    down = model.branches[0].down
    assert down.weight.shape == (32, 0)
    torch.testing.assert_close(down.bias, original.branches[0](torch.cat(data)).mean((0, 1)), rtol=0, atol=1e-4)
    assert change(model, original, data[0]) < 1e-4
    model.branches[0](data[0]).sum().backward()


def test_modes_and_frozen_layers_are_kept() -> None:
    model = transformer().to(torch.bfloat16).train()
    model.branches[1].gate.requires_grad_(False)
    el.compress(model, 0.6, ["narrow"], [x.to(torch.bfloat16) for x in inputs()])
    assert all(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["branches.1.gate.weight"]


def test_it_resumes_and_reuses(tmp_path: Path) -> None:
    outputs, data = [], inputs()
    for _ in range(2):
        model = transformer()
        el.compress(model, 0.6, ["narrow"], data, cache_dir=tmp_path / "folder", shared_cache_dir=tmp_path / "shared")
        outputs.append(model(data[0]))
    assert torch.equal(*outputs)
    model = transformer()
    el.compress(model, 0.6, ["narrow"], data)
    assert torch.equal(model(data[0]), outputs[0])


def test_narrow_blocks_are_no_slower() -> None:
    report = el.compress(transformer(), 0.6, ["narrow"], inputs(), only_if_faster=True)
    assert report.missed_budget is None
    assert {layer.structure.partition("(")[0] for layer in report.layers} <= {"narrow", "dense"}


def test_impossible_requests_raise() -> None:
    with pytest.raises(ValueError, match=r"unknown family 'narow'\. Did you mean 'narrow'\?"):
        el.compress(transformer(), 0.5, ["low_rank", "narow"], inputs())
    with pytest.raises(
        ValueError, match=r"narrow takes no argument but uniform=True, as in .*, not 'narrow\(rank=2\)'"
    ):
        el.compress(transformer(), 0.5, ["narrow(rank=2)"], inputs())
    with pytest.raises(ValueError, match="narrow needs calibration data: blocks that can be narrowed are found by"):
        el.compress(transformer(), 0.5, ["narrow"])
    with pytest.raises(ValueError, match=r"no block can be narrowed: branches\.0\.gate in no block of which.* as well"):
        el.compress(Model(Normalized()), 0.5, ["narrow"], inputs())
    with pytest.raises(ValueError, match=r"0\.1 of the 35,840 params of 13 layers cannot be reached .* keeps 0\.257"):
        el.compress(transformer(Normalized()), 0.1, ["narrow"], inputs())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [12, 20, 31])
def test_every_layer_is_covered_once(seed: int, budget: int) -> None:
    rng = random.Random(seed)

    def candidate() -> LayerCandidate:
        return LayerCandidate(str(rng.random()), rng.randint(1, 12), 0.5, rng.random())

    options = {name: [candidate() for _ in range(3)] for name in "abcde"}
    modules = [{name: candidate() for name in names} for names in ("ab", "ab", "ab", "de", "de")]
    choices = [{**dict(zip("abcde", alone, strict=True))} for alone in itertools.product(*options.values())]
    choices = [{**choice, **ab, **de} for choice in choices for ab in ({}, *modules[:3]) for de in ({}, *modules[3:])]
    affordable = [choice for choice in choices if sum(c.cost for c in choice.values()) <= budget]
    if not affordable:
        with pytest.raises(ValueError, match=f"more than the budget of {budget}"):
            allocate(options, budget, modules)
        return
    best = min(sum(c.output_change for c in choice.values()) for choice in affordable)
    chosen = allocate(options, budget, modules)
    assert chosen.keys() == options.keys()
    assert sum(c.cost for c in chosen.values()) <= budget
    assert sum(c.output_change for c in chosen.values()) == pytest.approx(best, rel=1e-3)
