"""Compression of the stacked experts of transformers: one structure per stack, fitted expert by expert."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import einlinear as el
from einlinear.compression.calibration import Calibration
from einlinear.compression.expert_stacks import open_experts, stacks_of
from einlinear.compression.forward_passes import Passes
from einlinear.compression.selection import select_layers
from einlinear.nn import GatedExperts

EXPERTS = "model.layers.0.mlp.experts"
STACKS = [f"{EXPERTS}.{name}" for name in ("gate", "up", "down")]


def mixture(experts: int = 4) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "moe_intermediate_size": 24, "eos_token_id": 2}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts=experts, num_experts_per_tok=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 48, (4, 32), generator=generator) for _ in range(count)]


@torch.no_grad()
def inputs_by_expert(model: nn.Module, data: list[Tensor]) -> list[Tensor]:
    """The inputs of every expert of a dense model."""
    calls = list[tuple[Tensor, Tensor]]()
    experts = model.get_submodule(EXPERTS)
    handle = experts.register_forward_pre_hook(lambda _, args: calls.append((args[0], args[1])))
    for batch in data:
        model(batch)
    handle.remove()
    x, indices = (torch.cat(parts) for parts in zip(*calls, strict=True))
    return [x[(indices == e).any(1)] for e in range(len(experts.get_parameter("down_proj")))]


def test_errors_are_those_of_all_tokens_with_their_experts() -> None:
    model, data = mixture(), batches()
    dense, inputs = copy.deepcopy(model.get_submodule(EXPERTS)), inputs_by_expert(model, data)
    assert max(map(len, inputs)) > 1.2 * min(map(len, inputs))
    report = el.compress(model, 0.5, ["low_rank", "monarch"], data, layers="*.experts", sequential=False)
    assert [layer.name for layer in report.layers] == STACKS
    assert report.params <= 0.5 * report.params_before == 0.5 * 4 * 3 * 32 * 24
    experts = model.get_submodule(EXPERTS)
    assert isinstance(experts, GatedExperts)
    weights = dict(zip(("gate", "up"), dense.get_parameter("gate_up_proj").chunk(2, 1), strict=True))
    for name, weight in weights.items():
        stack = experts.stacks()[name]
        entry = next(layer for layer in report.layers if layer.name == f"{EXPERTS}.{name}")
        assert entry.structure == stack.structure.spec
        assert entry.macs == 2 * stack.structure.macs
        change = weight - stack.dense_weights()
        with torch.no_grad():
            errors = sum((x @ w.T).square().sum() for x, w in zip(inputs, change, strict=True))
            energy = sum((x @ w.T).square().sum() for x, w in zip(inputs, weight, strict=True))
        assert entry.error == pytest.approx(float(errors / energy), rel=1e-3)
        assert 0.01 < entry.error == pytest.approx(entry.expected_error, rel=0.2)


def test_outputs_change_less_than_with_weights_alone() -> None:
    data, original = batches(), mixture()
    found = []
    with torch.no_grad():
        expected = original(data[0]).logits
        for calibration in (data, None):
            model = mixture()
            el.compress(model, 0.4, ["low_rank"], calibration, layers="*.experts")
            found.append(float((model(data[0]).logits - expected).square().sum()))
    assert found[0] < 0.8 * found[1]


def test_experts_with_few_tokens_have_the_moment_of_all() -> None:
    model = mixture(experts=16)
    # 2 * 24 pairs of a token and an expert
    data = [batches(1)[0][:1, :24]]
    inputs = inputs_by_expert(model, data)
    counts = [len(x) for x in inputs]
    assert min(counts) < max(counts) < 32
    # the first expert gets all tokens, again and again
    data += [data[0]] * 3
    inputs = inputs_by_expert(model, data)
    assert max(map(len, inputs)) >= 32 > min(map(len, inputs))
    with open_experts(model, True):
        selection = select_layers(model, "*.experts.gate", data)
        calibrated = Calibration(Passes(model, data), selection, lambda *_: None)
        ((_, collect),) = calibrated.statistics(selection.stages)
        statistics = collect()
    total = sum(map(len, inputs))
    assert statistics.tokens == total
    everything = torch.cat(inputs).double()
    of_all = everything.T @ everything / total
    for x, moment in zip(inputs, statistics.second_moment, strict=True):
        own = x.double().T @ x.double() / max(len(x), 1)
        expected = (own if len(x) >= 32 else of_all) * max(len(x), 1) / total
        torch.testing.assert_close(moment, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_macs_and_the_sequence_of_other_layers() -> None:
    model = mixture()
    report = el.compress(model, 0.5, ["low_rank"], batches(), count="macs")
    assert {layer.name for layer in report.layers} > {*STACKS}
    kept = sum(layer.macs for layer in report.layers)
    before = 2 * 3 * 32 * 24 + sum(l.params_before for l in report.layers if l.name not in STACKS)
    assert 0.4 * before < kept <= 0.5 * before


def test_a_stack_that_stays_dense_beside_others() -> None:
    model, data = mixture(), batches(2)
    before = copy.deepcopy(model.get_submodule(EXPERTS))
    el.compress(model, 0.5, ["low_rank"], data, layers="*.experts.down")
    experts = model.get_submodule(EXPERTS)
    assert isinstance(experts, GatedExperts)
    assert [stack.structure.spec.partition("(")[0] for stack in experts.stacks().values()] == ["dense"] * 2 + [
        "low_rank"
    ]
    assert torch.equal(experts.to_dense().gate_up_proj, before.get_parameter("gate_up_proj"))
    assert not stacks_of(model)
    el.densify(model)
    assert type(model.get_submodule(EXPERTS)) is Qwen3MoeExperts


@pytest.mark.parametrize("how", ["error", "dense", "bytes"])
def test_experts_come_back_as_they_were(how: str) -> None:
    model, data = mixture().train(), batches(2)
    experts = model.get_submodule(EXPERTS)
    parameters = dict(model.named_parameters())
    compress = partial(el.compress, model, calibration=data)
    if how == "error":
        with pytest.raises(ValueError, match="cannot be reached"):
            compress(0.001, ["low_rank"])
    elif how == "dense":
        compress(1.0, ["low_rank"])
    else:
        report = compress(0.5, ["low_rank"], count="bytes", layers=["*.experts", "*.q_proj"])
        reason = "is a stack of 4 experts of a Qwen3MoeExperts, which is compressed with count='params' or 'macs' only"
        assert dict(report.skipped)[EXPERTS].startswith(reason)
    assert model.get_submodule(EXPERTS) is experts
    assert experts.training
    if how != "bytes":
        assert all(parameters[name] is parameter for name, parameter in model.named_parameters())


def test_distillation() -> None:
    model, data = mixture(), batches()
    original = copy.deepcopy(model)
    el.compress(model, 0.5, ["low_rank"], data)
    losses = el.distill(model, original, data, steps=29).losses
    assert losses[-1] < 0.9 * losses[0]
    assert not isinstance(original.get_submodule(EXPERTS), GatedExperts)


def test_one_shared_cache_for_budgets_that_open_experts_and_others(tmp_path: Path) -> None:
    for count in ("params", "bytes"):
        el.compress(mixture(), 0.5, ["low_rank"], batches(), count=count, shared_cache_dir=tmp_path)
