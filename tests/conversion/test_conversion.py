"""convert and densify: what is replaced, what is kept, what is skipped and why, what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers.pytorch_utils import Conv1D

import einlinear as el
from einlinear.structures import FAMILIES


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"q": nn.Linear(16, 16), "out": nn.Linear(16, 16, bias=False)})
        self.mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(self.attn["out"](self.attn["q"](x)))
        return y


def structures(model: nn.Module) -> dict[str, str]:
    return {name: module.structure.spec for name, module in model.named_modules() if isinstance(module, el.Linear)}


def test_all_layers() -> None:
    model = Block()
    report = el.convert(model, "btt")
    assert structures(model) == dict.fromkeys(["attn.q", "attn.out", "mlp.0", "mlp.2"], "btt")
    assert [c.name for c in report.converted] == ["attn.q", "attn.out", "mlp.0", "mlp.2"]
    assert model.attn["out"].bias is None
    assert report.params == sum(p.numel() for name, p in model.named_parameters() if not name.endswith("bias"))
    assert report.params_before == 2 * 16 * 16 + 2 * 16 * 64
    assert model(torch.randn(3, 16)).shape == (3, 16)


def test_first_match_wins_and_layers_filter() -> None:
    model = Block()
    report = el.convert(
        model, {"*.q": "low_rank(rank=2)", "attn.*": "kronecker", "*": "monarch(blocks=2)"}, ["attn*", "mlp.0"]
    )
    assert structures(model) == {"attn.q": "low_rank(rank=2)", "attn.out": "kronecker", "mlp.0": "monarch(blocks=2)"}
    assert type(model.mlp[2]) is nn.Linear
    assert report.skipped == ()


def test_project_keeps_the_function_if_possible() -> None:
    model = Block().double()
    x = torch.randn(3, 16, dtype=torch.float64)
    y = model(x)
    report = el.convert(model, "low_rank(rank=16)", weights="project")
    torch.testing.assert_close(model(x), y)
    assert all(c.error is not None and c.error < 1e-10 for c in report.converted)
    lossy = el.convert(Block(), "low_rank(rank=2)", weights="project")
    assert all(c.error is not None and 0.3 < c.error < 1 for c in lossy.converted)
    assert "attn.q" in str(lossy)
    assert "Linear 16 -> 64" in str(lossy)


def test_densify_is_the_inverse() -> None:
    model = Block().double()
    el.convert(model, {"attn*": "dyad", "mlp*": "btt(rank=2)"})
    model.mlp[0] = el.Linear(16, 64, "btt", normalize=True, dtype=torch.float64)
    x = torch.randn(3, 16, dtype=torch.float64)
    y = model(x)
    report = el.densify(model)
    assert not structures(model)
    assert {type(m) for name, m in model.named_modules() if name.count(".") == 1 and name != "mlp.1"} == {nn.Linear}
    torch.testing.assert_close(model(x), y)
    assert len(report.converted) == 4
    with pytest.raises(ValueError, match="there is no structured layer in the model"):
        el.densify(model)


def test_convert_keeps_device_dtype_and_modes() -> None:
    model = Block().to(torch.bfloat16).eval()
    model.mlp[0].weight.requires_grad_(False)
    bias = model.mlp[0].bias.clone()
    new = copy.deepcopy(model)
    el.convert(model, "btt", weights="project")
    el.convert(new, "btt")
    for converted in (model, new):
        layer = converted.mlp[0]
        assert layer.A.dtype == torch.bfloat16
        assert not layer.training
        assert not layer.A.requires_grad
        assert layer.bias.requires_grad
        assert converted.mlp[2].A.requires_grad
    assert torch.equal(model.mlp[0].bias, bias)
    assert not new.mlp[0].bias.any()
    with torch.device("meta"):
        meta = Block()
    el.convert(meta, "btt")
    assert meta.mlp[0].A.is_meta
    with torch.device("meta"):
        meta = Block()
    with pytest.raises(ValueError, match="meta device"):
        el.convert(meta, "btt", weights="project")
    assert not structures(meta)


@pytest.mark.parametrize("normalize", [False, True])
def test_densify_keeps_device_dtype_and_modes(normalize: bool) -> None:
    model = nn.ModuleList(el.Linear(16, 16, "btt", normalize=normalize, dtype=torch.bfloat16) for _ in range(3)).eval()
    for parameter in model[0].weight_parameters():
        parameter.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    model[1].A.requires_grad_(False)  # B still learns
    el.densify(model)
    found = [(layer.weight.requires_grad, layer.bias.requires_grad, layer.training) for layer in model]
    assert found == [(False, True, False), (True, False, False), (True, True, False)]
    assert all(layer.weight.dtype == torch.bfloat16 for layer in model)
    frozen = el.Linear(16, 16, "btt")
    for parameter in frozen.weight_parameters():
        parameter.requires_grad_(False)
    assert not el.Linear.from_dense(frozen, "dense").A.requires_grad  # the bias is not the weight


def hook(*args: object) -> None: ...


@pytest.mark.parametrize(
    "add",
    [
        lambda layer: layer.register_forward_hook(hook),
        lambda layer: layer.register_full_backward_pre_hook(hook),
        lambda layer: layer.register_state_dict_post_hook(hook),
        lambda layer: layer.register_load_state_dict_pre_hook(hook),
        lambda layer: layer.bias.register_hook(hook),
        lambda layer: layer.bias.register_post_accumulate_grad_hook(hook),
    ],
)
def test_hooks_are_never_lost(add: Callable[[nn.Module], object]) -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(2)))
    add(model[0])
    assert el.convert(model, "btt").skipped == (("0", "has hooks, which would be lost"),)
    model = nn.Sequential(*(el.Linear(16, 16, "btt") for _ in range(3)))
    model[1].A, model[1].B = model[0].A, model[0].B
    add(model[0])
    reason = "it, or a layer that shares its factors, has hooks, which would be lost"
    assert el.densify(model).skipped == (("0", reason), ("1", reason))
    assert [type(layer) for layer in model] == [el.Linear, el.Linear, nn.Linear]
    with pytest.raises(ValueError, match="no layer could be converted: 0: it, or a layer"):
        el.densify(model)


def test_shared_modules_stay_shared() -> None:
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    report = el.convert(model, "btt", weights="project")
    assert model[0] is model[2]
    assert len(report.converted) == 1
    el.densify(model)
    assert model[0] is model[2]


def test_tied_weights() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    before = copy.deepcopy(model)
    el.convert(model, "btt")
    assert model[0].A is model[1].A
    assert model[0].bias is not model[1].bias
    assert model[2].A is not model[1].A
    el.densify(model)
    assert model[0].weight is model[1].weight
    report = el.convert(before, {"0": "btt", "1": "dyad", "2": "btt"})
    assert [name for name, _ in report.skipped] == ["0", "1"]
    assert "tied to 1" in report.skipped[0][1]
    embedding = nn.Embedding(16, 16)
    language = nn.ModuleDict({"embed": embedding, "body": nn.Linear(16, 16), "head": nn.Linear(16, 16, bias=False)})
    language["head"].weight = embedding.weight
    report = el.convert(language, "btt")
    assert structures(language) == {"body": "btt"}
    assert report.skipped == (("head", "its weight is tied to embed, which is not converted to the same structure"),)


def test_conv1d_of_transformers() -> None:
    model = nn.Sequential(Conv1D(24, 16), nn.Linear(24, 8)).double()
    x = torch.randn(3, 16, dtype=torch.float64)
    y = model(x)
    el.convert(model, "low_rank(rank=16)", layers="0", weights="project")
    assert (model[0].in_features, model[0].out_features) == (16, 24)
    torch.testing.assert_close(model(x), y)
    model[0].A.requires_grad_(False)
    model[0].B.requires_grad_(False)
    el.densify(model.eval())
    assert type(model[0]) is Conv1D  # as the code around it, and its files, expect
    assert (model[0].weight.shape, model[0].weight.requires_grad, model[0].training) == ((16, 24), False, False)
    torch.testing.assert_close(model(x), y)
    el.convert(model, "btt", layers="0")
    el.densify(model)
    assert type(model[0]) is Conv1D


def test_skipped_layers_are_listed_with_reasons() -> None:
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(16, 16),
            "small": nn.Linear(17, 16),
            "attention": nn.MultiheadAttention(16, 4),
            "normed": parametrizations.weight_norm(nn.Linear(16, 16)),
            "spectral": parametrizations.spectral_norm(nn.Linear(16, 16)),
            "pruned": prune.l1_unstructured(nn.Linear(16, 16), "weight", 0.5),
            "lazy": nn.LazyLinear(16),
            "quantised": nn.Linear(16, 16),
            "hooked": nn.Linear(16, 16),
            "patched": nn.Linear(16, 16),
            "done": el.Linear(16, 16, "btt"),
            "bilinear": nn.Bilinear(16, 16, 16),
        }
    )
    model["hooked"].register_forward_hook(lambda *args: None)
    model["patched"].forward = lambda x: x
    model["quantised"].weight = type("Int8Parameter", (nn.Parameter,), {})(torch.zeros(16, 16), False)
    report = el.convert(model, "monarch(blocks=4)")
    assert [c.name for c in report.converted] == ["plain"]
    reasons = dict(report.skipped)
    assert "nearby sizes that fit: 16 and 20" in reasons["small"]
    assert reasons["attention.out_proj"].startswith("is never called: MultiheadAttention computes with its weight")
    for name in ("normed", "spectral"):
        assert "has a parametrization, which would be lost" in reasons[name]
    assert "computed from others (bias, weight_orig)" in reasons["pruned"]
    assert "has no weight yet: call the model once" in reasons["lazy"]
    assert reasons["quantised"] == "has a weight that is a Int8Parameter, as quantised and sharded layers have"
    assert reasons["hooked"] == "has hooks, which would be lost"
    assert reasons["patched"] == "has a forward of its own beside that of its class, which would be lost"
    assert reasons["done"] == "is already structured: btt"
    assert all(f"skipped {name}: " in str(report) for name in reasons)
    assert "bilinear" not in reasons
    assert "(attention.in_proj_weight)" in str(report)
    assert "bilinear" in str(report)


@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
)
def test_permanent_parametrizations_are_converted(change: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(change(nn.Linear(16, 16)))
    with pytest.raises(ValueError, match=r"no layer could be converted: 0: has a .* make it permanent first"):
        el.convert(model, "btt")
    if parametrize.is_parametrized(model[0]):
        parametrize.remove_parametrizations(model[0], "weight")
    else:
        prune.remove(model[0], "weight")
    assert len(el.convert(model, "btt").converted) == 1


def test_exclude() -> None:
    model = Block()
    report = el.convert(model, "btt", "*", ["mlp.2", "*.q"])
    assert set(structures(model)) == {"attn.out", "mlp.0"}
    assert report.skipped == ()
    with pytest.raises(ValueError, match="no layer matches layers and structure, and is not excluded"):
        el.convert(Block(), "btt", exclude="*")


def test_normalize_and_gamma_by_glob() -> None:
    model = Block()
    el.convert(model, {"attn.*": "btt", "mlp.0": "dense", "*": "low_rank"}, normalize=True, gamma=["attn.out", "mlp.*"])
    layers = {name: module for name, module in model.named_modules() if isinstance(module, el.Linear)}
    assert {name: (m.normalize, m.has_gamma) for name, m in layers.items()} == {
        "attn.q": (True, False),
        "attn.out": (True, True),
        "mlp.0": (False, False),  # "dense" is never normalised unless asked
        "mlp.2": (True, True),
    }
    model = Block()
    el.convert(model, {"mlp.0": "dense", "*": "btt"}, normalize="mlp.0", gamma=False)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, el.Linear)}
    assert {name for name, m in layers.items() if m.normalize} == {"mlp.0"}
    assert not layers["mlp.0"].has_gamma


def test_experts() -> None:
    model = Block().bfloat16().eval()
    model.attn["q"].weight.requires_grad_(False)
    report = el.convert(model, {"mlp*": "btt", "*": "low_rank(rank=2)"}, exclude="mlp.2", experts=4, active=1)
    moe = model.mlp[0]
    assert isinstance(moe, el.MoELinear)
    assert (moe.experts, moe.active, moe.structure.spec, moe.training) == (4, 1, "btt", False)
    assert (moe.A.dtype, moe.router.dtype, moe.bias.requires_grad) == (torch.bfloat16, torch.bfloat16, True)
    assert not any(p.requires_grad for name, p in model.attn["q"].named_parameters() if name != "bias")
    assert model.attn["out"].bias is None
    assert isinstance(model.mlp[2], nn.Linear)
    done = {c.name: c for c in report.converted}["mlp.0"]
    assert done.after == "4 experts of btt, 1 active"
    assert done.params == sum(p.numel() for name, p in moe.named_parameters() if name != "bias")
    assert done.macs == moe.structure.macs + 4 * 16
    model = Block()
    el.convert(model, "btt", experts=3, normalize=True, gamma="mlp*")
    assert model.mlp[0].active == 2
    assert (model.mlp[0].has_gamma, model.attn["q"].has_gamma) == (True, False)
    y = model(torch.randn(5, 16))
    (y.square().mean() + 0.01 * el.moe_loss(model)).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.mlp[2] = nn.Linear(64, 16)
    assert dict(el.convert(model, "btt").skipped)["mlp.0"] == "is already structured: btt"
    reason = "is a mixture of experts, which no dense layer computes"
    assert dict(el.densify(model).skipped) == dict.fromkeys(["attn.q", "attn.out", "mlp.0"], reason)
    tied = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    tied[1].weight = tied[0].weight
    el.convert(tied, "btt", experts=2)
    assert tied[0].A is tied[1].A
    assert tied[0].bias is not tied[1].bias


@pytest.mark.parametrize("weights", ["init", "project"])
@pytest.mark.parametrize("spec", ["dense", "low_rank", "btt(cores=3)", "dyad", "blast(blocks=4, rank=2)"])
def test_a_zero_start_is_kept(spec: str, weights: str) -> None:
    """A layer that was made to put out its bias at first goes on to do so, and all of it can learn."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[2].weight)
    bias = model[1].bias.detach().clone()
    report = el.convert(model, spec, weights=weights)
    assert [c.starts_at_zero for c in report.converted] == [False, True, True]
    assert "These weights were zero and still are, and biases were kept: 1, 2." in str(report)
    assert torch.equal(model[1](torch.randn(3, 16)), bias.expand(3, 16))
    assert not model[2].weight.any()
    assert model[0].weight.any()
    if weights == "init":
        assert not model[0].bias.any()
    model[1](torch.randn(3, 16)).square().sum().backward()
    assert any(p.grad.any() for p in model[1].weight_parameters() if p.grad is not None)


def test_a_zero_start_of_mixtures_and_of_conv1d() -> None:
    model = nn.Sequential(Conv1D(16, 16), nn.Linear(16, 16))
    for layer in model:
        nn.init.zeros_(layer.weight)
    el.convert(model, "btt", layers="1", experts=4)
    el.convert(model, "btt", layers="0")
    assert torch.equal(model(torch.randn(3, 16)), model[1].bias.expand(3, 16))


def test_the_report_has_the_coverage() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 64, 3), "lstm": nn.LSTM(16, 32), "head": nn.Linear(16, 16)})
    report = el.convert(model, "btt")
    assert report.coverage is not None
    assert report.coverage.params == sum(p.numel() for p in model.parameters()) + report.params_before - report.params
    assert report.coverage.considered == 256
    assert str(report).startswith("Warning: the layers considered hold only 3.0% of the model's parameters")
    assert {other.kind for other in report.coverage.others} >= {"convolutions", "recurrent layers"}
    assert el.densify(model).coverage is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"structure": "bttt"}, "unknown family 'bttt'. Did you mean 'btt'"),
        ({"structure": {"attn*": "btt", "mlp*": "btt(rnk=2)"}}, "btt has no argument 'rnk'"),
        ({"structure": "i, o i"}, "expected '->'"),
        ({"structure": "btt", "layers": "mpl*"}, r"layers: 'mpl\*' matches no linear layer; the nearest are mlp"),
        (
            {"structure": {"*": "btt", "atn.*": "dyad"}},
            r"structure: 'atn\.\*' matches no linear layer; the nearest are attn",
        ),
        ({"structure": {}}, "the mapping of globs to structures is empty"),
        ({"structure": "btt", "weights": "projected"}, "weights must be 'init' or 'project', not 'projected'"),
        ({"structure": "monarch(blocks=11)"}, "no layer could be converted: attn.q: monarch"),
        ({"structure": {"mlp*": "btt"}, "layers": "attn*"}, "no layer matches layers and structure"),
        ({"structure": "btt", "weights": "project", "normalize": True}, "normalize is for weights='init'"),
        ({"structure": "btt", "exclude": "head"}, "exclude: 'head' matches no linear layer"),
        ({"structure": "btt", "normalize": "head"}, "normalize: 'head' matches no linear layer"),
        ({"structure": "btt", "normalize": True, "gamma": ["*.k"]}, r"gamma: '\*\.k' matches no linear layer"),
        ({"structure": "btt", "gamma": False}, "gamma=False is for layers that are normalised: give normalize"),
        ({"structure": "btt", "active": 2}, "active=2 is for mixtures of experts: give experts as well"),
        ({"structure": "btt", "experts": 2, "active": 3}, "active=3: a token goes to at least one and at most"),
        ({"structure": "btt", "experts": 2, "weights": "project"}, "experts have new weights: give weights='init'"),
    ],
)
def test_mistakes_change_nothing(arguments: dict[str, object], message: str) -> None:
    model = Block()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        el.convert(model, **arguments)
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_a_structure_of_one_size_is_refused() -> None:
    s = el.structure("btt(rank=2)", 16, 16)
    for structure in (s, {"*": s}):
        with pytest.raises(TypeError, match=r"a Structure has one size: give its spec, 'btt\(rank=2\)'"):
            el.convert(Block(), structure)
    with pytest.raises(TypeError, match=r"a structure is given as text such as 'btt\(rank=2\)', not 3"):
        el.convert(Block(), 3)


def test_a_family_with_a_mistake_in_it_is_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("einlinear.structures.families.FAMILIES", dict(FAMILIES))
    el.register_family("wrong", lambda in_features=0: f"i, o i -> o where i={int('many')}")
    with pytest.raises(ValueError, match=r"^attn\.q: invalid literal for int\(\) with base 10: 'many'"):
        el.convert(Block(), "wrong")


def test_globs_match_whole_names() -> None:
    """As the docstring says: '*.attn.*' needs something before attn, '*attn.*' does not."""
    with pytest.raises(ValueError, match=r"'\*\.attn\.\*' matches no linear layer"):
        el.convert(Block(), {"*.attn.*": "btt"})
    for model, glob, name in ((Block(), "*attn.*", "attn.q"), (nn.Sequential(Block()), "*.attn.*", "0.attn.q")):
        el.convert(model, {glob: "btt"})
        assert set(structures(model)) == {name, name.replace("q", "out")}


def test_normalize() -> None:
    model = Block()
    model.mlp[2].weight.requires_grad_(False)
    el.convert(model, "btt", normalize=True)
    assert all(module.normalize for module in model.modules() if isinstance(module, el.Linear))
    assert model.mlp[0].gamma_A.requires_grad
    assert not model.mlp[2].gamma_A.requires_grad
    tied = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    tied[1].weight = tied[0].weight
    el.convert(tied, "btt", normalize=True)
    assert tied[0].A is tied[1].A
    assert tied[0].gamma_A is tied[1].gamma_A
    assert tied[0].bias is not tied[1].bias


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = Block()
    with torch.no_grad():
        model.mlp[0].weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"mlp\.0: the weight has values that are NaN or infinite"):
        el.convert(model, "btt", weights="project")
    assert not structures(model)


@pytest.mark.parametrize("training", [True, False])
def test_transformers_of_torch_still_run(training: bool) -> None:
    """In evaluation they read the weights of their layers and pass them to a fused kernel."""
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).train(training)
    x = torch.randn(2, 5, 16)
    el.convert(model, "low_rank(rank=16)", weights="project")
    assert set(structures(model)) == {"linear1", "linear2"}
    with torch.no_grad():
        y = model(x)
        el.densify(model)
        torch.testing.assert_close(model(x), y)


def test_a_bare_layer_cannot_be_converted_in_place() -> None:
    with pytest.raises(ValueError, match=r"use el\.Linear.from_dense"):
        el.convert(nn.Linear(4, 4), "btt")
    with pytest.raises(ValueError, match=r"use layer\.to_dense\(\)"):
        el.densify(el.Linear(4, 4, "btt"))
    with pytest.raises(TypeError, match=r"expected an nn\.Linear, a Conv1D or a weight of shape"):
        el.Linear.from_dense(nn.Conv2d(3, 3, 3), "btt")
    with pytest.raises(ValueError, match=r"use el\.Linear.from_dense"):
        el.convert(Conv1D(4, 4), "btt")
    with pytest.raises(ValueError, match=r"a weight has shape \(out_features, in_features\), not \(2, 3, 4\)"):
        el.Linear.from_dense(torch.zeros(2, 3, 4), "btt")


def test_a_converted_model_trains() -> None:
    torch.manual_seed(0)
    model = Block()
    el.convert(model, "btt(rank=2)", weights="project")
    optimizer = torch.optim.AdamW(el.param_groups(model, lr=1e-2, base=None))
    x, y = torch.randn(64, 16), torch.randn(64, 16)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
