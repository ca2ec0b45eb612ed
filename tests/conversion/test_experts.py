"""Conversion of the experts modules of transformers, which stack the weights of all experts, and back."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import einlinear as el
from einlinear.nn import GatedExperts

_SIZES = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_SIZES |= {"num_key_value_heads": 1, "head_dim": 16, "eos_token_id": 2}
EXPERTS = [f"model.layers.{i}.mlp.experts" for i in range(2)]


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**_SIZES, intermediate_size=64, num_local_experts=4))


def qwen2() -> nn.Module:
    sizes = {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 32, "num_experts": 6}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**_SIZES, **sizes, intermediate_size=64, num_experts_per_tok=3))


def qwen3() -> nn.Module:
    sizes = {"moe_intermediate_size": 48, "num_experts": 16, "num_experts_per_tok": 3}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SIZES, **sizes, intermediate_size=64))


def make(model: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = model().to(dtype).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            # far from where transformers starts: hidden features of experts count
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    # the other implementations of transformers lack float64
    made.set_experts_implementation("eager")  # type: ignore[operator]
    return made


@torch.no_grad()
def logits(model: nn.Module, tokens: int = 5) -> Tensor:
    result: Tensor = model(torch.arange(3, 3 + tokens)[None]).logits
    return result


# of 16 experts, three tokens reach at most 9
@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("model", [mixtral, qwen2, qwen3])
def test_an_exact_structure_leaves_the_outputs(model: Callable[[], nn.Module], tokens: int) -> None:
    converted = make(model)
    el.convert(converted, {"*.experts": "low_rank(rank=4)"}, weights="project")
    structured = logits(converted, tokens)
    el.densify(converted)
    assert not any(isinstance(module, GatedExperts) for module in converted.modules())
    torch.testing.assert_close(logits(converted, tokens), structured, rtol=1e-8, atol=1e-8)
    report = el.convert(converted, {"*.experts": "low_rank(rank=4)"}, weights="project")
    assert [c.name for c in report.converted] == EXPERTS
    assert all(c.error is not None and c.error < 1e-6 for c in report.converted)
    torch.testing.assert_close(logits(converted, tokens), structured, rtol=1e-7, atol=1e-7)


def test_projection_takes_the_closest_and_reports_its_error() -> None:
    model = make(qwen3)
    before = {name: copy.deepcopy(model.get_submodule(name)) for name in EXPERTS}
    report = el.convert(model, "low_rank(rank=8)", layers="*.experts", weights="project")
    for entry in report.converted:
        dense, new = before[entry.name], model.get_submodule(entry.name)
        assert isinstance(new, GatedExperts)
        back = new.to_dense()
        squares = energy = 0.0
        for key in ("gate_up_proj", "down_proj"):
            weight = dense.get_parameter(key).detach()
            squares += float((back.get_parameter(key).detach() - weight).square().sum())
            energy += float(weight.square().sum())
        assert entry.error == pytest.approx((squares / energy) ** 0.5, rel=1e-3)
        assert 0.1 < entry.error < 0.9


def test_the_report_counts_all_parameters_and_the_macs_of_active_experts() -> None:
    report = el.convert(make(qwen2), {"*.experts": "low_rank(rank=8)"})
    first = report.converted[0]
    assert first.before == "Qwen2MoeExperts 6 x 32 -> 48"
    assert first.after == "6 experts of low_rank(rank=8), 3 active"
    assert (first.params_before, first.params) == (6 * 3 * 32 * 48, 6 * 3 * 8 * (32 + 48))
    assert (first.macs_before, first.macs) == (3 * 3 * 32 * 48, 3 * 3 * 8 * (32 + 48))
    assert report.coverage is not None
    assert report.coverage.considered == report.params_before
    back = el.densify(nn.Sequential(GatedExperts.like(make(mixtral).get_submodule(EXPERTS[0]), "btt")))
    assert (back.converted[0].after, back.params, back.macs) == ("MixtralExperts 4 x 32 -> 64", 24576, 12288)


def test_state_is_kept_and_all_layers_convert_at_once() -> None:
    model = make(mixtral, torch.bfloat16).train()
    model.get_submodule(EXPERTS[0]).requires_grad_(False)
    report = el.convert(model, {"*.experts": "btt", "*": "low_rank(rank=4)"}, normalize=True, exclude="lm_head")
    assert not report.skipped
    assert [c.name for c in report.converted if "btt" in c.after] == EXPERTS
    frozen, learns = (model.get_submodule(name) for name in EXPERTS)
    assert {p.requires_grad for p in frozen.parameters()} == {False}
    assert {p.requires_grad for p in learns.parameters()} == {True}
    assert {p.dtype for p in learns.parameters()} == {torch.bfloat16}
    assert isinstance(learns, GatedExperts)
    assert learns.training
    assert learns.gate.normalize
    assert learns.down.has_gamma
    again = el.convert(nn.ModuleDict({"experts": learns, "other": nn.Linear(8, 8)}), "low_rank(rank=2)")
    assert again.skipped == (("experts", "is already structured: 4 experts of btt, 2 active"),)


def test_new_experts_learn() -> None:
    model = make(mixtral, torch.float32).train()
    el.convert(model, {"*.experts": "low_rank(rank=8)"})
    ids = torch.arange(3, 23)[None]
    optimizer = torch.optim.Adam((p for n, p in model.named_parameters() if ".experts." in n), 1e-2)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_roles_are_known_to_mup() -> None:
    def converted(width: int) -> nn.Module:
        sizes = {**_SIZES, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1}
        model = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4))
        el.convert(model, {"*.experts": "low_rank(rank=8)"})
        return model

    model = converted(64)
    shapes = el.base_shapes(model)
    stacks = {name: shapes[f"{EXPERTS[0]}.{name}.weight"] for name in ("gate", "up", "down")}
    assert stacks == {"gate": [128, 64], "up": [128, 64], "down": [64, 128]}
    rates = learning_rates(model, converted(32))
    # those of a layer of the same size and structure
    alone = learning_rates(el.Linear(64, 128, "low_rank(rank=8)"), el.Linear(32, 64, "low_rank(rank=8)"))
    assert alone["A"] != alone["B"]
    assert {name: rates[f"{EXPERTS[0]}.up.{name}"] for name in "AB"} == {name: alone[name] for name in "AB"}


def learning_rates(model: nn.Module, base: nn.Module) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = el.param_groups(model, 1e-2, base=base)
    return {names[id(p)]: group["lr"] for group in groups for p in group["params"]}


def other(kind: str) -> nn.Module:
    experts = MixtralExperts(MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=3))
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    if kind == "hooks":
        experts.register_forward_hook(lambda *_: None)
    elif kind == "bias":
        experts.bias = nn.Parameter(torch.zeros(3, 16))
    elif kind == "clamp":
        experts.__class__ = type("ClampedExperts", (MixtralExperts,), {"forward": _clamped})
    elif kind == "swapped":
        experts.__class__ = type("SwappedExperts", (MixtralExperts,), {"forward": _swapped})
    elif kind == "shapes":
        experts.down_proj = nn.Parameter(torch.zeros(3, 24, 16))
    elif kind == "activation":
        experts.act_fn = nn.PReLU()
    elif kind == "no gate":
        sizes = {"hidden_size": 16, "moe_intermediate_size": 24, "n_routed_experts": 3}
        return NemotronHExperts(NemotronHConfig(**sizes))
    return experts


def _swapped(self: nn.Module, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return _loop(self, x, indices, weights, lambda gate, up: self.act_fn(up) * gate)


def _clamped(self: nn.Module, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return _loop(self, x, indices, weights, lambda gate, up: self.act_fn(gate).clamp(max=7) * up)


def _loop(self: nn.Module, x: Tensor, indices: Tensor, weights: Tensor, gated: Callable[..., Tensor]) -> Tensor:
    gate, up = torch.einsum("nd,nkod->nko", x, self.get_parameter("gate_up_proj")[indices]).chunk(2, -1)
    return torch.einsum("nkh,nkdh,nk->nd", gated(gate, up), self.get_parameter("down_proj")[indices], weights)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("hooks", "has hooks, which would be lost"),
        ("bias", "is a stack of 3 experts of a MixtralExperts: it has bias beside gate_up_proj and down_proj"),
        ("clamp", "is a stack of 3 experts of a ClampedExperts: it computes something else"),
        ("swapped", "is a stack of 3 experts of a SwappedExperts: it computes something else"),
        ("shapes", r"its weights have shapes \(3, 48, 16\) and \(3, 24, 16\), not \(experts, 2 \* hidden, in\)"),
        ("activation", "it has act_fn.weight beside gate_up_proj and down_proj"),
        ("no gate", "is a stack of 3 experts of a NemotronHExperts: it has no gate_up_proj"),
    ],
)
def test_experts_that_compute_something_else_stay(kind: str, reason: str) -> None:
    model = nn.ModuleDict({"experts": other(kind), "head": nn.Linear(16, 16)})
    report = el.convert(model, "low_rank(rank=2)")
    ((name, given),) = report.skipped
    assert name == "experts"
    assert re.search(reason, given)


def test_plain_experts_are_not_among_them() -> None:
    """The check of `other` would be worth nothing if it refused all."""
    model = nn.ModuleDict({"experts": other("")})
    assert not el.convert(model, "low_rank(rank=2)").skipped


def test_what_does_not_fit_is_skipped_or_raises() -> None:
    config = GptOssConfig(**_SIZES, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2)
    model = GptOssForCausalLM(config)
    report = el.convert(model, "low_rank(rank=4)")
    assert dict(report.skipped).keys() == {*EXPERTS}
    with pytest.raises(
        ValueError, match=r"no layer could be converted: model\.layers\.0\.mlp\.experts: is a stack of 4"
    ):
        el.convert(model, "low_rank(rank=4)", layers="*.experts")
    mixture = make(mixtral)
    skipped = dict(el.convert(mixture, "low_rank(rank=4)", experts=2, exclude="lm_head").skipped)
    assert skipped == dict.fromkeys(EXPERTS, "has several experts already")
    with pytest.raises(ValueError, match=r"mlp\.experts"):
        el.convert(make(mixtral), {"*.experts": "monarch(blocks=7)"})
