"""The papers' variants of the reference models: how every parameter starts and learns, worked out by hand.

Features are split 152 = 4 38, 40 = 4 10, 160 = 8 20 and 96 = 8 12; balanced splits of 152, 40 and 160 are others.
Core A of a BTT from m0 m1 to n0 n1 maps m0 to r n0, and core B maps r m1 to n1. A core from i to o starts with a
standard deviation of sqrt(min(i, o)) / i and learns (in_features / i) / 2 times as fast as a dense layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import einlinear as el
from einlinear_lab.models import GPT, MODELS, ReferenceModel, ResidualMLP, Shape
from einlinear_lab.models.blocks import PublishedDenseLinear
from einlinear_lab.models.published import PublishedMoELinear
from einlinear_lab.runs.execution import execute
from einlinear_lab.runs.run import Run

PAPER_1, PAPER_2 = "2406.06248", "2410.02117"
IMAGES, TEXT = Shape(152, 5), Shape(96, 96, context=12)
# Standard deviation of the start, None for a norm or a gamma, which starts at one; and learning rate of Adam.
Table = dict[str, tuple[float | None, float]]
ONE, ZERO = (None, 1.0), (0.0, 1.0)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """The standard deviation of the last draw, by the id of a tensor."""
    stds: dict[int, float] = {}
    normal = nn.init.normal_

    def recorded(tensor: Tensor, mean: float = 0.0, std: float = 1.0, generator: Any = None) -> Tensor:
        stds[id(tensor)] = std
        return normal(tensor, mean, std, generator)

    monkeypatch.setattr(nn.init, "normal_", recorded)
    return stds


def table(kind: str, drawn: dict[int, float], shape: Shape = TEXT, **options: Any) -> Table:
    torch.manual_seed(0)
    config = MODELS[kind](width=40, base_width=20, **options)
    model = config.build(shape)
    el.init_(model, zero=model.ZERO)
    groups = el.param_groups(model, 1.0, base=config.base(shape), lr_scale=model.LR_SCALE)
    rates = {name: group["lr_mult"] for group in groups for name in group["param_names"]}

    def std(p: Tensor) -> float | None:
        if not p.any():
            return 0.0
        if (p == 1).all():
            return None
        if p.numel() > 400:
            assert float(p.detach().std()) == pytest.approx(drawn[id(p)], rel=0.12)
        return drawn[id(p)]

    return {name: (std(p), rates[name]) for name, p in model.named_parameters()}


def check(found: Table, expected: Table) -> None:
    assert found.keys() == expected.keys()
    for name, (std, rate) in expected.items():
        assert found[name][0] == (std if std is None else pytest.approx(std, rel=1e-4)), name
        assert found[name][1] == pytest.approx(rate, rel=1e-4), name


# Starts and learning rates


def test_mlp_of_btt(drawn: dict[int, float]) -> None:
    expected: Table = {
        "input.A": (0.5, 1.9),  # 4 -> 8; 152 / 4 / 2, and a tenth of it
        "input.B": (0.041609, 0.1),  # 76 -> 10; 152 / 76 / 2
        "input.bias": (0.0, 0.1),
        "blocks.0.norm.weight": ONE,
        "blocks.0.norm.bias": ZERO,
        "blocks.0.fc1.A": (0.5, 2.5),  # 4 -> 16; 40 / 4 / 2, and half of it for twice the base width
        "blocks.0.fc1.B": (0.223607, 0.5),  # 20 -> 20; 40 / 20 / 2
        "blocks.0.fc1.bias": ZERO,
        "blocks.0.fc2.A": (0.353553, 5.0),  # 8 -> 8; 160 / 8 / 2
        "blocks.0.fc2.B": (0.0, 1.0),  # 40 -> 10; 160 / 40 / 2
        "blocks.0.fc2.bias": ZERO,
        "head.weight": (0.0, 0.5),
        "head.bias": ZERO,
    }
    check(table("mlp", drawn, IMAGES, structure="btt(rank=2)", depth=1, paper=PAPER_1), expected)


@pytest.mark.parametrize(
    ("structure", "rows"),
    [
        ("dense", {"input.A": (0.081111, 0.1), "blocks.0.fc1.A": (0.158114, 0.5), "blocks.0.fc2.A": (0.0, 0.5)}),
        (
            "kronecker",
            {
                "input.A": (0.5, 1.9),  # 4 -> 4
                "input.B": (0.083218, 0.2),  # 38 -> 10
                "blocks.0.fc1.A": (0.5, 2.5),  # 4 -> 8
                "blocks.0.fc1.B": (0.316228, 1.0),  # 10 -> 20
            },
        ),
        ("low_rank(rank=4)", {"input.A": (0.013158, 0.05), "input.B": (0.5, 1.9), "blocks.0.fc1.B": (0.5, 2.5)}),
        # 2 blocks of 76 inputs and 20 intermediates, and of 20 intermediates and 20 outputs
        ("monarch(blocks=2)", {"input.A": (0.058844, 0.1), "input.B": (0.223607, 0.38)}),
    ],
)
def test_mlp_of_others(structure: str, rows: Table, drawn: dict[int, float]) -> None:
    found = table("mlp", drawn, IMAGES, structure=structure, depth=1, paper=PAPER_1)
    check({name: found[name] for name in rows}, rows)


def attention(query: Table, value: Table, out: Table) -> Table:
    layers = {"query": query, "key": query, "value": value, "out": out}
    rows = {f"{layer}.{name}": row for layer, rows in layers.items() for name, row in rows.items()}
    return rows | {"norm.weight": ONE, "query_norm.weight": ONE, "key_norm.weight": ONE}


def gpt(attention: Table, feed_forward: Table, head: Table) -> Table:
    tables = {"embedding.": {"weight": (0.02, 1.0)}, "positions.": {"weight": (0.02, 1.0)}, "norm.": {"weight": ONE}}
    tables |= {"blocks.0.attention.": attention, "blocks.0.feed_forward.": feed_forward | {"norm.weight": ONE}}
    return {prefix + name: row for prefix, rows in (tables | {"head.": head}).items() for name, row in rows.items()}


GAMMAS: Table = {"gamma_A": ONE, "gamma_B": ONE}
OPTIONS: dict[str, Any] = {"depth": 1, "d_head": 20, "base_expansion": 1}


@pytest.mark.parametrize("paper", [PAPER_1, PAPER_2])
def test_gpt_of_btt(paper: str, drawn: dict[int, float]) -> None:
    square: Table = {"A": (0.5, 2.5), "B": (0.158114, 0.5)}  # 4 -> 8, 20 -> 10
    out: Table = {"A": (0.5, 2.5), "B": (0.0, 0.5)}
    feed_forward: Table = {
        "fc1.A": (0.5, 2.5),
        "fc1.B": (0.223607, 0.5),
        "fc2.A": (0.353553, 1.25),  # as in the MLP, but 160 inputs are 8 times those of the base model
        "fc2.B": (0.0, 0.25),
        **{f"{layer}.{name}": row for layer in ("fc1", "fc2") for name, row in GAMMAS.items()},
    }
    expected = gpt(attention(square, square | GAMMAS, out | GAMMAS), feed_forward, out | GAMMAS)
    options = OPTIONS | {"structure": "btt(rank=2)", "head_structure": "btt(rank=2)"}
    check(table("gpt", drawn, **options, paper=paper), expected)


def test_einsums_of_the_second_paper_have_no_gammas() -> None:
    def gammas(structure: str, paper: str) -> int:
        names = dict(GPT(96, 64, 12, structure=structure, depth=1, paper=paper).named_parameters())
        return sum("gamma" in name for name in names)

    assert (gammas("einsum(theta=(1/2, 1/4, 1/4, 1/4, 1/2, 1/4, 0))", PAPER_2), gammas("btt", PAPER_2)) == (0, 8)
    assert gammas("low_rank", PAPER_1) == gammas("btt", PAPER_1) == 8


def test_btt_moe(drawn: dict[int, float]) -> None:
    """Experts of rank 1, drawn with 1 / sqrt(fan_in), and one gamma for all."""
    router, wide_router = {"router": (0.0, 0.5)}, {"router": (0.0, 0.125)}
    square: Table = {"A": (0.5, 2.5), "B": (0.316228, 1.0), **GAMMAS, **router}  # 4 -> 4, 10 -> 10
    out: Table = square | {"B": (0.0, 1.0)}
    up: Table = {"A": (0.5, 2.5), "B": (0.316228, 1.0), **GAMMAS, **router}  # 4 -> 8, 10 -> 20
    down: Table = {"A": (0.353553, 1.25), "B": (0.0, 0.5), **GAMMAS, **wide_router}  # 8 -> 4, 20 -> 10
    feed_forward = {f"fc1.{name}": row for name, row in up.items()} | {f"fc2.{name}": row for name, row in down.items()}
    found = table("gpt", drawn, **OPTIONS, structure="btt", experts=4, paper=PAPER_2)
    check(found, gpt(attention(square, square, out), feed_forward, {"A": (0.0, 0.5)}))


def test_standard_mixture(drawn: dict[int, float]) -> None:
    """A random router, and dense attention."""
    square, out = {"A": (0.158114, 0.5)}, {"A": (0.0, 0.5)}
    feed_forward: Table = {"router": (0.158114, 0.5), "fc1.A": (0.158114, 0.5), "fc2.A": (0.0, 0.125)}
    found = table("gpt", drawn, **OPTIONS, structure="dense", experts=4, routed="feed_forward", paper=PAPER_2)
    check(found, gpt(attention(square, square, out), feed_forward, out))


# What they are made of


@pytest.mark.parametrize("model", ["mlp", "vit", "gpt"])
def test_sizes_are_the_published_ones_unless_a_split_is_named(model: str) -> None:
    shape = TEXT if model == "gpt" else Shape(3 * 8 * 8, 5, (3, 8, 8))

    def specs(structure: str) -> set[str]:
        options: dict[str, Any] = {"width": 64, "depth": 1, "paper": PAPER_1}
        built = MODELS[model](**options, structure=structure).build(shape)
        return {layer.structure.spec for layer in built.modules() if type(layer) is el.Linear}

    assert specs("btt(rank=2)") == {"btt(rank=2, split=published)"}
    assert specs("kronecker") == {"kronecker(split=published)"}
    assert specs("btt(split=balanced)") == {"btt"}
    assert specs("low_rank") == {"low_rank"}
    assert specs("i, r i, o r -> o where r=2") == {"i, r i, o r -> o where r=2"}


def test_names_of_parameters_are_those_of_the_default_models() -> None:
    def names(model: ReferenceModel) -> set[str]:
        return {name for name, _ in model.named_parameters()}

    mlps = [names(ResidualMLP(48, 32, 5, paper=paper)) for paper in (None, PAPER_1)]
    assert mlps[0] - mlps[1] == {"norm.weight", "norm.bias"}
    assert mlps[1] < mlps[0]
    options: dict[str, Any] = {"structure": "btt", "d_head": 16, "depth": 1}
    assert names(GPT(96, 32, 12, **options)) == names(GPT(96, 32, 12, **options, paper=PAPER_1))


def test_mlp_is_what_is_written_out() -> None:
    torch.manual_seed(0)
    model: Any = ResidualMLP(48, 32, 5, depth=2, structure="btt", paper=PAPER_1).double()
    x = torch.randn(7, 48).double()
    h = F.gelu(x @ model.input.dense_weight().T + model.input.bias)
    for block in model.blocks:
        hidden = F.gelu(block.fc1(F.layer_norm(h, (32,), block.norm.weight, block.norm.bias)))
        h = h + hidden @ block.fc2.dense_weight().T + block.fc2.bias
    torch.testing.assert_close(model(x), h @ model.head.weight.T + model.head.bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("paper", "multiplier"), [(PAPER_1, 1.0), (PAPER_2, 0.707107), (None, 0.707107)])
def test_multipliers_of_branches(paper: str | None, multiplier: float) -> None:
    model = GPT(96, 64, 12, depth=6, paper=paper)
    found = [module.multiplier for module in model.modules() if hasattr(module, "multiplier")]
    assert len(found) == 12
    assert found == pytest.approx([multiplier] * 12, rel=1e-6)


def test_experts_are_normalised_together() -> None:
    torch.manual_seed(0)
    layer = PublishedMoELinear(160, 40, "btt(split=published)", experts=4, normalize=True).double()
    with torch.no_grad():
        layer.A[0] *= 100
        layer.gamma_A.fill_(3)
    a, b = layer.factors()
    rms = layer.A.square().mean().sqrt()
    torch.testing.assert_close(a, 3 * layer.A / (rms / 0.25), rtol=1e-6, atol=0)  # sqrt(min(8, 4)) / 8
    torch.testing.assert_close(b, layer.B / (layer.B.square().mean().sqrt() / 10**0.5 * 20).clamp(min=1))
    a.square().sum().backward()
    assert layer.A.grad is not None
    assert layer.A.grad.isfinite().all()


@pytest.mark.parametrize("routed", ["linear", "feed_forward"])
def test_nothing_breaks_ties(routed: str) -> None:
    def experts(paper: str | None) -> set[int]:
        torch.manual_seed(0)
        model = GPT(96, 64, 12, depth=1, structure="dense", experts=8, routed=routed, paper=paper)
        model(torch.randint(96, (4, 12)))
        mixture: Any = model.get_submodule("blocks.0.feed_forward" + (".fc1" if routed == "linear" else ""))
        mixture.router.data.zero_()
        model(torch.randint(96, (4, 12)))
        return set(mixture.last.indices.flatten().tolist())

    assert len(experts(PAPER_2)) == 2
    assert len(experts(None)) > 4


# Files, runs and mistakes


@pytest.mark.parametrize("experts", [None, 4])
def test_checkpoints(experts: int | None) -> None:
    def build(paper: str | None = PAPER_2) -> GPT:
        return GPT(96, 40, 12, depth=1, d_head=20, structure="btt", experts=experts, paper=paper)

    model, other, tokens = build(), build(), torch.randint(96, (2, 12))
    assert not torch.equal(other(tokens), model(tokens))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens), model(tokens))
    with pytest.raises(RuntimeError, match=r"is btt\(split=published\), but was saved as btt"):
        model.load_state_dict(build(None).state_dict())


def test_a_run_resumes(tmp_path: Path) -> None:
    options = {"model": "mlp", "data": "digits", "structure": "btt", "width": 40, "depth": 1, "paper": PAPER_1}
    run = Run.of(options | {"betas": "0.9,0.999", "steps": 4, "batch_size": 32, "threads": 1, "checkpoint_every": 2})
    assert Run.of(run.config) == run
    found = execute(run, tmp_path, keep_checkpoints=True)
    (tmp_path / "result.json").unlink()
    assert execute(run, tmp_path).train_loss == found.train_loss


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "mlp", "paper": PAPER_2}, "model=mlp has variants of paper=2406.06248, not of '2410.02117'"),
        ({"model": "gpt", "paper": "1"}, "model=gpt has variants of paper=2406.06248 or 2410.02117, not of '1'"),
        ({"model": "gpt", "paper": PAPER_1, "experts": 4}, "has no mixtures of experts: choose model=gpt paper=2410"),
        ({"model": "opt", "paper": PAPER_1}, "has no option 'paper'"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Run.of(options | {"data": "data/text", "data_kind": "text" if options["model"] != "mlp" else None, "steps": 1})


def test_dense_layers_stay_those_of_torch() -> None:
    model = ResidualMLP(48, 32, 5, depth=1, paper=PAPER_1)
    layers = [layer for layer in model.modules() if isinstance(layer, el.Linear)]
    assert {type(layer) for layer in layers} == {PublishedDenseLinear}
    x = torch.randn(3, 32)
    weight, bias = layers[1].dense_weight(), layers[1].bias
    assert torch.equal(layers[1](x), F.linear(x, weight, bias))
