"""`GatedExperts`: equal to the experts modules of transformers that they replace, for any routing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

from einlinear import ops
from einlinear.nn import GatedExperts

SPECS = ["dense", "low_rank(rank=8)", "btt", "monarch(blocks=4)"]


def experts_of(kind: type = MixtralExperts) -> nn.Module:
    """Of 32 -> 48 features in float64, in transformers' plain implementation: its other ones lack float64."""
    torch.manual_seed(0)
    config = (
        MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=5, hidden_act="silu")
        if kind is MixtralExperts
        else Qwen3MoeConfig(hidden_size=32, moe_intermediate_size=48, num_experts=5, num_experts_per_tok=3)
    )
    config._experts_implementation = "eager"
    module: nn.Module = kind(config).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def routing(tokens: int, active: int, among: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their experts among the first few, and weights that do not add up to one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 32, generator=generator, dtype=torch.float64)
    indices = torch.stack([torch.randperm(among, generator=generator)[:active] for _ in range(tokens)])
    return x, indices, torch.rand(tokens, active, generator=generator, dtype=torch.float64)


def exact(kind: type, spec: str) -> tuple[nn.Module, GatedExperts]:
    """A dense module whose weights have the structure, and the structured one that was projected from it."""
    dense = experts_of(kind)
    dense = GatedExperts.from_dense(dense, spec).to_dense()
    return dense, GatedExperts.from_dense(dense, spec)


@pytest.mark.parametrize("kind", [MixtralExperts, Qwen3MoeExperts])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("tokens", "active", "among"), [(40, 2, 5), (7, 1, 1), (6, 2, 2), (1, 3, 5)])
def test_outputs_are_those_of_the_dense_module(kind: type, spec: str, tokens: int, active: int, among: int) -> None:
    dense, structured = exact(kind, spec)
    arguments = routing(tokens, active, among)
    expected = dense(*arguments)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(structured(*arguments), expected, rtol=1e-8, atol=1e-8)


def test_the_index_after_the_last_stands_for_no_expert() -> None:
    dense, structured = exact(MixtralExperts, "btt")
    x, indices, weights = routing(8, 2, 5)
    indices[:4, 1] = 5
    indices[0] = 5
    expected = dense(x, indices, weights)
    assert not expected[0].any()
    torch.testing.assert_close(structured(x, indices, weights), expected, rtol=1e-8, atol=1e-8)


def test_gradients_are_those_of_the_dense_module() -> None:
    dense, structured = exact(MixtralExperts, "dense")
    x, indices, weights = routing(20, 2, 3)
    results = []
    for module in (dense, structured):
        tokens, gates = x.clone().requires_grad_(), weights.clone().requires_grad_()
        module(tokens, indices, gates).square().sum().backward()
        results.append((tokens.grad, gates.grad))
    torch.testing.assert_close(*results)
    gate, up = dense.get_parameter("gate_up_proj").grad.chunk(2, 1)  # type: ignore[union-attr]
    for stack, expected in zip(structured.stacks().values(), (gate, up, dense.get_parameter("down_proj").grad)):
        torch.testing.assert_close(next(stack.parameters()).grad.view_as(expected), expected)  # type: ignore[union-attr, arg-type]
    # of experts without a token
    assert not next(structured.down.parameters()).grad[3:].any()  # type: ignore[index]


def test_experts_are_projected_one_by_one_for_their_own_inputs() -> None:
    dense, names = experts_of(), ("gate", "up", "down")
    root = {name: torch.randn(5, n, n, dtype=torch.float64) for name, n in zip(names, (32, 32, 48))}
    moments = {name: r @ r.mT for name, r in root.items()}
    spec = {"gate": "low_rank(rank=4)", "up": "low_rank(rank=8)", "down": "btt"}
    layer = GatedExperts.from_dense(dense, spec, moments)
    weights = dict(zip(names, (*dense.get_parameter("gate_up_proj").chunk(2, 1), dense.get_parameter("down_proj"))))
    for name, stack in layer.stacks().items():
        assert stack.structure.spec.startswith(spec[name])
        for e in range(5):
            factors = ops.project(stack.structure, weights[name][e], moments[name][e])
            expected = ops.dense_weight(stack.structure, factors)
            torch.testing.assert_close(stack.dense_weights()[e], expected)
    # one moment for all experts
    layer.up.project(weights["up"], moments["up"][0])
    expected = ops.dense_weight(layer.up.structure, ops.project(layer.up.structure, weights["up"][3], moments["up"][0]))
    torch.testing.assert_close(layer.up.dense_weights()[3], expected)


def test_the_class_comes_back_with_its_state() -> None:
    dense = experts_of().eval()
    dense.get_parameter("down_proj").requires_grad_(False)
    layer = copy.deepcopy(GatedExperts.from_dense(dense, "dense"))
    assert type(layer.activation) is type(dense.act_fn)
    assert not any(isinstance(module, MixtralExperts) for module in layer.modules())
    assert "MixtralExperts" not in repr(layer)
    back = layer.to_dense()
    assert type(back) is MixtralExperts
    assert not back.training
    assert (back.gate_up_proj.requires_grad, back.down_proj.requires_grad) == (True, False)
    assert back.state_dict().keys() == dense.state_dict().keys()
    for name, tensor in dense.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)
    # no state is shared with what it replaced
    assert layer.to_dense() is not layer.to_dense()


def test_half_precision_keeps_the_dtype_of_the_tokens() -> None:
    layer = GatedExperts(32, 48, "low_rank(rank=8)", experts=5, active=2).bfloat16()
    x, indices, weights = routing(6, 2, 5)
    y = layer(x.bfloat16(), indices, weights.float())
    assert (y.dtype, y.shape) == (torch.bfloat16, (6, 32))
    torch.testing.assert_close(y.float(), layer.float()(x.float(), indices, weights.float()), rtol=0.05, atol=0.05)
    assert layer(x[:0].float(), indices[:0], weights[:0].float()).shape == (0, 32)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"keys \['up', 'down'\], but needs \['gate', 'up', 'down'\]"):
        GatedExperts(32, 48, {"up": "btt", "down": "btt"})
    with pytest.raises(ValueError, match="unknown activation 'swish'"):
        GatedExperts(32, 48, "btt", "swish")
    layer = GatedExperts(32, 48, "btt", experts=5)
    with pytest.raises(RuntimeError, match="replaced no module of transformers"):
        layer.to_dense()
    with pytest.raises(ValueError, match=r"shape \(5, 32, 48\), but the experts need \(5, 48, 32\)"):
        layer.up.project(torch.zeros(5, 32, 48))
    with pytest.raises(ValueError, match="meta device"):
        layer.up.project(torch.zeros(5, 48, 32, device="meta"))
