"""Structure-aware muP: published multipliers, groups, initialisation, roles."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import einlinear as el
from einlinear.mup.factor_multipliers import adam_multipliers, sgd_multipliers
from einlinear.structures.initialization import init_std
from einlinear_lab.models import ResidualMLP
from einlinear_lab.models.blocks import ResidualFeedForward

D = 1024
ROOT = math.sqrt(D)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [  # arXiv 2406.06248, section 3 and its code, square layers of d = 1024 features: factor A multiplies x first
        ("dense", [1]),
        ("low_rank(rank=8)", [1 / 2, D / 16]),
        ("kronecker", [ROOT / 2, ROOT / 2]),
        ("tt(rank=4)", [ROOT / 2, ROOT / 8]),
        ("btt", [ROOT / 2, ROOT / 2]),
        ("btt(rank=4)", [ROOT / 2, ROOT / 8]),
        ("monarch(blocks=4)", [2, 2]),
        ("monarch(blocks=16)", [8, 8]),
        ("dyad(blocks=4)", [4, 4]),
    ],
)
def test_adam_multipliers_are_the_published_ones(spec: str, expected: list[float]) -> None:
    s = el.structure(spec, D, D)
    found = dict(zip([factor.name for factor in s.factors], adam_multipliers(s), strict=True))
    assert [found[name] for name in sorted(found)] == pytest.approx(expected)


def test_multipliers_of_rectangular_layers() -> None:
    s = el.structure("btt(rank=2)", 1024, 4096)  # fan_in, fan_out: A 32 -> 128, B 64 -> 64
    assert adam_multipliers(s) == pytest.approx((1024 / 32 / 2, 1024 / 64 / 2))
    assert sgd_multipliers(s) == pytest.approx((1024 / 32 / 2, 1024 / 64 / 2))
    # the gradient of A grows by the fan-out over the fan-in of B, 1024 / 16
    assert sgd_multipliers(el.structure("low_rank(rank=16)", 256, 1024)) == pytest.approx((16 / 1024 / 2, 256 / 16 / 2))
    # every entry is used 16 times
    assert sgd_multipliers(el.structure("kronecker", 256, 256)) == pytest.approx((256 / 16 / 4 / 2,) * 2)


def test_init_std() -> None:
    assert init_std(el.structure("low_rank(rank=16)", 256, 256)) == pytest.approx((4 / 256, 4 / 16))
    assert init_std(el.structure("btt", 1024, 4096)) == pytest.approx((math.sqrt(32) / 32, math.sqrt(32) / 32))
    assert init_std(el.structure("dyad(blocks=4)", 64, 64)) == pytest.approx((1 / 4 / math.sqrt(2),) * 2)  # two terms


def mlp(width: int, structure: str = "dense") -> ResidualMLP:
    return ResidualMLP(48, width, 10, depth=2, structure=structure)


def by_name(groups: list[dict[str, Any]], key: str) -> dict[str, float]:
    return {name: group[key] for group in groups for name in group["param_names"]}


def test_groups_of_a_dense_model_follow_mup() -> None:
    lr = by_name(el.param_groups(mlp(256), lr=0.1, base=mlp(64)), "lr")
    assert lr["input.A"] == pytest.approx(0.1)  # its fan-in is not a width
    assert lr["blocks.0.fc1.A"] == lr["blocks.1.fc2.A"] == lr["head.weight"] == pytest.approx(0.1 / 4)
    assert lr["blocks.0.fc1.bias"] == lr["norm.weight"] == lr["head.bias"] == pytest.approx(0.1)
    lr = by_name(el.param_groups(mlp(256), lr=0.1, base=mlp(64), optimizer="sgd"), "lr")
    assert lr["input.A"] == lr["blocks.0.fc1.bias"] == lr["norm.weight"] == pytest.approx(0.1 * 4)
    assert lr["blocks.0.fc1.A"] == lr["head.bias"] == pytest.approx(0.1)
    assert lr["head.weight"] == pytest.approx(0.1 / 4)


def test_groups_of_a_structured_model() -> None:
    model = mlp(256, "btt(rank=2)")
    groups = el.param_groups(model, lr=0.1, base=mlp(64), weight_decay=0.01)
    mult = by_name(groups, "lr_mult")
    block = model.blocks[0]
    assert isinstance(block, ResidualFeedForward)
    fc1 = dict(zip("AB", adam_multipliers(block.fc1.structure), strict=True))
    assert mult["blocks.0.fc1.A"] == pytest.approx(fc1["A"] * 64 / 256)
    assert mult["blocks.0.fc1.B"] == pytest.approx(fc1["B"] * 64 / 256)
    assert all(group["lr"] == pytest.approx(0.1 * group["lr_mult"]) for group in groups)
    decay = by_name(groups, "weight_decay")
    assert {name for name, value in decay.items() if value} == {
        name for name, _ in model.named_parameters() if name.endswith((".A", ".B", "head.weight"))
    }
    assert len(groups) <= 8
    named = dict(model.named_parameters())
    for group in groups:
        assert all(named[name] is p for name, p in zip(group["param_names"], group["params"], strict=True))
    assert sorted(decay) == sorted(named)
    torch.optim.SGD(el.param_groups(model, lr=0.1, base=mlp(64), optimizer="sgd"))


def test_default_weight_decay_is_that_of_the_optimizer() -> None:
    def decays(**arguments: Any) -> dict[str, float]:
        groups = el.param_groups(mlp(64, "btt"), lr=0.1, base=mlp(64), **arguments)
        return by_name(torch.optim.AdamW(groups, weight_decay=0.3).param_groups, "weight_decay")

    for name, decay in decays().items():
        assert decay == (0.3 if name.endswith((".A", ".B", "head.weight")) else 0)
    assert decays(weight_decay=0.1, decay="coupled")["input.A"] == 0.1
    assert not any(decays(weight_decay=0.0).values())


def test_the_control_gives_every_factor_the_dense_rate() -> None:
    groups = el.param_groups(mlp(256, "btt"), lr=0.1, base=mlp(64), structure_aware=False)
    mult = by_name(groups, "lr_mult")
    assert mult["blocks.0.fc1.A"] == mult["blocks.0.fc1.B"] == pytest.approx(64 / 256)


def test_base_as_meta_model_dict_or_file(tmp_path: Path) -> None:
    with torch.device("meta"):
        meta = mlp(64, "kronecker")
    (tmp_path / "base.json").write_text(json.dumps(el.base_shapes(meta)))
    rates = [
        by_name(el.param_groups(mlp(256, "btt"), lr=0.1, base=base), "lr")
        for base in (mlp(64), meta, el.base_shapes(mlp(64)), tmp_path / "base.json", str(tmp_path / "base.json"))
    ]
    assert all(rate == rates[0] for rate in rates)


def test_a_base_that_is_no_file_of_shapes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"base: there is no file '.*missing.json', which holds el.base_shapes"):
        el.param_groups(mlp(64), 1e-3, base=tmp_path / "missing.json")
    (tmp_path / "damaged.json").write_text('{"0.weight": [64')
    with pytest.raises(ValueError, match=r"base: '.*damaged.json' is not the JSON of el.base_shapes"):
        el.param_groups(mlp(64), 1e-3, base=tmp_path / "damaged.json")


class Nested(nn.Module):
    """A layer that is called as DDP calls what it wraps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.module = mlp(width, "btt")


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = (torch.compile, nn.parallel.DistributedDataParallel, nn.DataParallel, checkpoint_wrapper)


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on torch.compile
def test_wrappers_do_not_change_names() -> None:
    rate = by_name(el.param_groups(Nested(32), lr=0.1, base=Nested(16)), "lr")
    assert "module.head.bias" in rate
    for wrappers in (*permutations(WRAPPERS, 1), *permutations(WRAPPERS, 2), *permutations(WRAPPERS, 4)):
        model = Nested(32)
        model.module.blocks[0] = checkpoint_wrapper(model.module.blocks[0])
        wrapped: Any = model
        for wrap in wrappers:
            wrapped = wrap(wrapped)
        assert by_name(el.param_groups(wrapped, lr=0.1, base=Nested(16)), "lr") == rate
        el.init_(wrapped, base=Nested(16), zero="module.head")
        assert not model.module.head.weight.any()


def test_lr_scale() -> None:
    plain = by_name(el.param_groups(mlp(64), lr=0.1, base=None), "lr_mult")
    scaled = by_name(el.param_groups(mlp(64), lr=0.1, base=None, lr_scale={"input": 0.1, "*.fc1": 3}), "lr_mult")
    assert scaled["input.A"] == pytest.approx(0.1 * plain["input.A"])
    assert scaled["input.bias"] == pytest.approx(0.1)
    assert scaled["blocks.1.fc1.A"] == pytest.approx(3 * plain["blocks.1.fc1.A"])
    assert scaled["blocks.1.fc2.A"] == plain["blocks.1.fc2.A"]


class Odd(nn.Module):
    """Parameters of its own, beside layers that are known."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(10, width))
        self.mixer = nn.Parameter(torch.zeros(width, width))
        self.scale = nn.Parameter(torch.ones(width))
        self.prompt = nn.Parameter(torch.zeros(10, 8))
        self.temperature = nn.Parameter(torch.ones(()))
        self.attention = nn.MultiheadAttention(width, 4, add_bias_kv=True)
        self.embed = nn.Embedding(100, width)


ROLES = {"pos*": "vector", "mixer": "hidden", "scale": "vector"}


def test_norms_of_other_libraries_are_known_by_their_name() -> None:
    class LlamaRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64))

    (group,) = el.param_groups(LlamaRMSNorm(), 1e-3, base=None)
    assert (group["lr_mult"], group["weight_decay"]) == (1.0, 0.0)


def test_roles_are_inferred_for_modules_without_a_description() -> None:
    groups = el.param_groups(Odd(64), lr=0.1, base=Odd(16))
    mult = by_name(groups, "lr_mult")
    assert mult["positions"] == mult["scale"] == mult["embed.weight"] == mult["attention.in_proj_bias"] == 1
    assert mult["mixer"] == mult["attention.in_proj_weight"] == mult["attention.out_proj.weight"] == 1 / 4
    assert mult["prompt"] == mult["temperature"] == mult["attention.bias_k"] == 1
    inferred = {name for group in groups for name in group.get("inferred", ())}
    assert inferred == {"positions", "mixer", "scale", "prompt"}
    assert by_name(el.param_groups(Odd(64), lr=0.1, base=Odd(16), roles=ROLES), "lr_mult") == mult


def test_inferred_roles_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "einlinear"):
        el.param_groups(Odd(16), lr=0.1, base=None)
    assert [record.getMessage() for record in caplog.records] == [
        "taken for vectors or tables: positions (10, 16), scale (16,), prompt (10, 8); "
        "override with roles={glob: role}",
        "taken for matrices: mixer (16, 16); override with roles={glob: role}",
    ]
    with caplog.at_level("INFO", "einlinear"):
        el.param_groups(Odd(16), lr=0.1, base=None, roles=ROLES | {"prompt": "vector"})
    assert len(caplog.records) == 2


def test_parameters_of_unknown_role_raise() -> None:
    class Ambiguous(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            # a table of vectors, or a head that lies here: both grow like that
            self.things = nn.Parameter(torch.zeros(10, width))
            # by its name a table, by its growth a matrix
            self.query = nn.Parameter(torch.zeros(width, 2 * width))
            self.router = nn.Parameter(torch.zeros(10, width))

    with pytest.raises(ValueError, match=r"unknown: things \(10, 64\), query \(64, 128\)\. Give it with"):
        el.param_groups(Ambiguous(64), lr=0.1, base=Ambiguous(16))
    with pytest.raises(ValueError, match=r"unknown: query \(64, 128\)"):
        el.init_(Ambiguous(64), base=el.base_shapes(Ambiguous(16)), roles={"things": "vector"})
    roles = {"things": "vector", "query": "hidden"}
    mult = by_name(el.param_groups(Ambiguous(64), lr=0.1, base=Ambiguous(16), roles=roles), "lr_mult")
    assert mult == {"things": 1, "query": 1 / 4, "router": 1 / 4}
    assert {*by_name(el.param_groups(Ambiguous(64), lr=0.1, base=None), "lr_mult").values()} == {1}


def test_parameters_that_do_not_grow_are_tables() -> None:
    groups = el.param_groups(Odd(16), lr=0.1, base=el.base_shapes(Odd(16)), optimizer="muon")
    assert {name for group in groups if "matrix_view" in group for name in group["param_names"]} == {
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }


def test_tables_decay_and_vectors_do_not() -> None:
    decays = {}
    for role in ("input", "vector"):
        groups = el.param_groups(Odd(16), 0.1, base=None, weight_decay=0.1, roles={"embed": role, "scale": role})
        decays[role] = by_name(groups, "weight_decay")
    assert (decays["input"]["embed.weight"], decays["vector"]["embed.weight"]) == (0.1, 0.0)
    assert decays["input"]["scale"] == decays["vector"]["scale"] == 0.0


def test_output_matrices_learn_as_hidden_ones() -> None:
    rates = [
        by_name(el.param_groups(mlp(256), 0.1, base=mlp(64), roles={"head": role}), "lr_mult")
        for role in ("hidden", "output")
    ]
    assert rates[0] == rates[1]
    assert rates[0]["head.weight"] == 64 / 256


def test_eps_is_for_adam() -> None:
    for optimizer, with_eps in (("adamw", {True}), ("sgd", {False}), ("muon", {True, False})):
        groups = el.param_groups(mlp(64), 0.1, base=None, optimizer=optimizer, eps=1e-12)
        assert {"eps" in group for group in groups} == with_eps
        assert all(("eps" in group) != ("matrix_view" in group) for group in groups if optimizer == "muon")
        assert {group["eps"] for group in groups if "eps" in group} <= {1e-12}
    assert not any("eps" in group for group in el.param_groups(mlp(64), 0.1, base=None))


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"mixer": "bias"}, "must be one of input, hidden, output, vector, not 'bias'"),
        ({"mixr": "hidden"}, "roles: 'mixr' matches no parameter or module; the nearest are mixer,"),
    ],
)
def test_mistakes_in_roles(roles: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        el.param_groups(Odd(64), lr=0.1, base=Odd(16), roles=ROLES | roles)


def test_roles_override_descriptions() -> None:
    mult = by_name(el.param_groups(mlp(256), lr=0.1, base=mlp(64), roles={"head*": "vector"}), "lr_mult")
    assert mult["head.weight"] == mult["head.bias"] == 1
    model = el.init_(mlp(256), roles={"head": "vector"})
    with torch.no_grad():
        model.head.weight.fill_(3)
    assert std(el.init_(model, roles={"head": "vector"}).head.weight) == 0  # left as it is
    with pytest.raises(ValueError, match=r"roles: blocks\.0\.fc1\.A is a factor of a structured layer"):
        el.param_groups(mlp(256, "btt"), lr=0.1, base=mlp(64), roles={"*.fc1": "vector"})


def tied(width: int) -> nn.ModuleDict:
    model = nn.ModuleDict({"embed": nn.Embedding(100, width), "head": nn.Linear(width, 100, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


def test_a_tied_weight_is_a_matrix_by_default() -> None:
    assert by_name(el.param_groups(tied(64), lr=0.1, base=tied(16)), "lr_mult") == {"embed.weight": 1 / 4}
    for glob in ("embed.weight", "head"):
        groups = el.param_groups(tied(64), lr=0.1, base=tied(16), roles={glob: "vector"})
        assert by_name(groups, "lr_mult") == {"embed.weight": 1}
    assert (
        by_name(el.param_groups(tied(64), lr=0.1, base=tied(16), lr_scale={"head": 2}), "lr_mult")["embed.weight"]
        == 2 / 4
    )
    shapes = {"head.weight": [100, 16]}  # of a model that registers the head first
    assert by_name(el.param_groups(tied(64), lr=0.1, base=shapes), "lr_mult") == {"embed.weight": 1 / 4}


def std(tensor: object) -> float:
    assert isinstance(tensor, torch.Tensor)
    return float(tensor.detach().std())


def test_init() -> None:
    torch.manual_seed(0)
    model = mlp(256, "btt")
    assert el.init_(model, base=mlp(64), zero=("*.fc2", "head")) is model
    block = model.blocks[0]
    assert isinstance(block, ResidualFeedForward)
    assert std(block.fc1.A) == pytest.approx(init_std(block.fc1.structure)[0], rel=0.1)
    assert std(block.fc2.A) == pytest.approx(init_std(block.fc2.structure)[0], rel=0.1)
    assert std(block.fc2.B) == 0  # only the last factor: the gradient still flows
    assert std(model.head.weight) == 0


def zero_starts() -> nn.ModuleDict:
    """Layers whose matrix is zero, each in a way of its own, and others."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "body": nn.Linear(64, 64),
            "head": nn.Linear(64, 10),
            "last": el.Linear(64, 64, "btt(rank=2)"),
            "first": el.Linear(64, 64, "low_rank(rank=4)"),
            "both": el.Linear(64, 64, "low_rank(rank=4)"),
            "sum": el.Linear(64, 64, "dyad(blocks=4)"),
            "uneven": el.Linear(64, 64, "dyad(blocks=4)"),
            "mixture": el.MoELinear(64, 64, "btt", experts=3, active=1),
            "convolution": nn.Conv2d(3, 3, 1),
        }
    )
    zero = {"head.weight", "last.B", "first.A", "both.A", "both.B", "sum.A", "sum.B", "uneven.A", "mixture.B"}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(0 if name in {*zero, "convolution.weight"} else 3)
    return model


def zero_matrices(model: nn.Module) -> set[str]:
    return {
        name
        for name, p in model.named_parameters()
        if not p.any() and not name.endswith(("bias", "router")) and p.numel() > 1
    }


def test_init_keeps_zero_starts(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "einlinear"):
        model = el.init_(zero_starts())
    kept = {"head.weight", "last.B", "first.A", "both.B", "sum.A", "sum.B", "mixture.B", "convolution.weight"}
    assert zero_matrices(model) == kept
    assert std(model["body"].weight) == pytest.approx(1 / 8, rel=0.1)
    assert std(model["both"].A) > 0  # one factor has to move for the other to learn
    (record,) = caplog.records
    assert record.getMessage().startswith("init_ leaves at zero: head.weight (10, 64), last.B ")
    assert record.getMessage().endswith("; zero=() draws them")
    for bias in (model["head"].bias, model["last"].bias):
        assert bias is not None
        assert not bias.any()


def test_zero_overrides_current_zeros() -> None:
    assert not zero_matrices(el.init_(zero_starts(), zero=()))
    assert zero_matrices(el.init_(zero_starts(), zero="body")) == {"body.weight"}
    assert zero_matrices(el.init_(zero_starts(), zero=["last", "first"])) == {"last.B", "first.B"}


def test_models_with_zero_matrices_only_are_drawn() -> None:
    """As after to_empty, when memory happens to be zero."""
    model = mlp(64, "btt")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not zero_matrices(el.init_(model)) - {name for name, p in model.named_parameters() if p.dim() == 1}
    head = nn.Linear(64, 10)
    nn.init.zeros_(head.weight)
    assert not el.init_(head).weight.any()
    with torch.device("meta"):
        el.init_(mlp(64, "btt"))


def test_a_converted_model_keeps_its_zero_starts() -> None:
    model = el.init_(mlp(64), zero=("*.fc2", "head"))
    drawn = el.init_(model)
    assert zero_matrices(drawn) == {"blocks.0.fc2.A", "blocks.1.fc2.A", "head.weight"}
    el.densify(model)
    el.convert(model, "btt", layers="*.fc1")
    assert zero_matrices(el.init_(model)) == {"blocks.0.fc2.weight", "blocks.1.fc2.weight", "head.weight"}
    el.convert(model, "btt", layers="*.fc2", weights="project")
    assert zero_matrices(el.init_(model)) == {"blocks.0.fc2.B", "blocks.1.fc2.B", "head.weight"}


@pytest.mark.parametrize(("fan_in", "fan_out"), [(784, 64), (64, 1024), (64, 10), (65, 10), (1024, 10)])
def test_dense_layers_and_the_dense_structure_start_alike(fan_in: int, fan_out: int) -> None:
    torch.manual_seed(0)
    expected = math.sqrt(min(fan_in, fan_out)) / fan_in
    assert init_std(el.structure("dense", fan_in, fan_out)) == pytest.approx((expected,))
    for base in (None, nn.ModuleList([nn.Linear(fan_in, fan_out)]), nn.ModuleList([nn.Linear(16, 7)])):
        layer = el.init_(nn.ModuleList([nn.Linear(fan_in, fan_out)]), base=base)[0]
        assert std(layer.weight) == pytest.approx(expected, rel=0.1)
        assert not layer.bias.any()


def test_one_glob_or_a_list() -> None:
    for zero in ("*.fc2", ["*.fc2"], ("*.fc2",)):
        model = el.init_(mlp(64), zero=zero)
        assert std(model.blocks[0].fc2.A) == 0
        assert std(model.head.weight) > 0
    with pytest.raises(TypeError, match=r"zero must be a glob such as '\*\.fc2', or a list of globs, not 4"):
        el.init_(mlp(64), zero=4)
    for argument in ("roles", "lr_scale"):
        with pytest.raises(TypeError, match=rf"{argument} must map globs such as '\*\.fc2' to values, not '\*\.fc2'"):
            el.param_groups(mlp(64), lr=0.1, base=None, **{argument: "*.fc2"})


def test_mistakes() -> None:
    message = r"optimizer must be 'sgd', 'muon', 'soap' or one of adam, adamw, .*, not 'adamm'"
    with pytest.raises(ValueError, match=message):
        el.param_groups(mlp(64), lr=0.1, base=None, optimizer="adamm")
    with pytest.raises(ValueError, match=r"the base has no '0.weight': it must be the same model at another width"):
        el.param_groups(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), lr=0.1, base=nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"lr_scale: '\*.fc3' matches no parameter or module; the nearest are .*fc"):
        el.param_groups(mlp(64), lr=0.1, base=None, lr_scale={"*.fc3": 2})
    with pytest.raises(ValueError, match="zero: 'tail' matches no parameter or module"):
        el.init_(mlp(64), zero=["tail"])
    with pytest.raises(ValueError, match=r"the base has no '0.weight'"):
        el.init_(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), base=nn.Linear(8, 8))
    with pytest.raises(ValueError, match="decay must be 'independent' or 'coupled', not 'decoupled'"):
        el.param_groups(mlp(64), lr=0.1, base=None, decay="decoupled")
    with pytest.raises(ValueError, match=r"alpha must be from 0\.5 to 1, not 2"):
        el.param_groups(mlp(64), lr=0.1, base=None, alpha=2)
    with pytest.raises(TypeError, match="base must be a model, a mapping of shapes"):
        el.param_groups(mlp(64), lr=0.1, base=64)
    with pytest.raises(TypeError, match="base"):
        el.param_groups(mlp(64), lr=0.1)
