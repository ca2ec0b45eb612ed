"""`MoELinear`: what every token meets, how ties are broken, what goes wrong, and that nothing else happens."""

from __future__ import annotations

import copy
import gc
import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import einlinear as el
from einlinear import ops
from einlinear.nn import MoEFeedForward
from einlinear.nn.moe import Experts
from einlinear_lab.models import GPT
from einlinear_lab.models.macs import macs_per_token

SPECS = ["btt", "low_rank(rank=4)", "monarch(blocks=4)", "dense", "dyad"]


def layer(spec: str = "btt", experts: int = 5, active: int = 2, normalize: bool = True) -> el.MoELinear:
    """One whose parameters have all moved away from where they start."""
    torch.manual_seed(0)
    made = el.MoELinear(32, 48, spec, experts, active, normalize=normalize).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def token_by_token(moe: el.MoELinear, x: Tensor) -> Tensor:
    """In plain operators, with the definition of every part written out."""
    matrices = []
    for e in range(moe.experts):
        alone = el.Linear(32, 48, moe.structure, normalize=moe.normalize).double()
        own = {
            name: p[e] if p.dim() > 1 else p[e, None]
            for name, p in moe.named_parameters()
            if name in dict(alone.named_parameters()) and name != "bias"
        }
        factors = torch.func.functional_call(_Factors(alone), {f"layer.{name}": p for name, p in own.items()}, ())
        matrices.append(ops.dense_weight(moe.structure, factors))
    rows = []
    for token in x:
        logits = moe.router @ token
        best = logits.topk(moe.active)
        gates = best.values.softmax(0)
        assert moe.bias is not None
        row = moe.bias + sum(gate * (matrices[int(e)] @ token) for gate, e in zip(gates, best.indices, strict=True))
        rows.append(row)
    return torch.stack(rows)


class _Factors(nn.Module):
    def __init__(self, layer: el.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> list[Tensor]:
        return self.layer.factors()


@pytest.mark.parametrize("load", ["random", "one expert", "empty experts"])
@pytest.mark.parametrize("spec", SPECS)
def test_outputs_and_gradients_of_a_loop_over_tokens(spec: str, load: str) -> None:
    moe = layer(spec)
    x = torch.randn(40, 32).double()
    if load != "random":
        x[:, 0] = 1  # so that a router can lean on it
        with torch.no_grad():
            moe.router[0, 0] += 50
            moe.router[1 if load == "one expert" else slice(1, 4), 0] += 40
    x.requires_grad_()
    inputs = [x, *moe.parameters()]
    expected, y = token_by_token(moe, x), moe(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    grad = torch.randn_like(y)
    wanted = torch.autograd.grad(expected, inputs, grad)
    for (name, _), a, b in zip([("x", x), *moe.named_parameters()], torch.autograd.grad(y, inputs, grad), wanted):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=name)
    assert moe.last is not None
    busy = (moe.last.counts > 0).sum()
    assert busy == {"random": 5, "one expert": 2, "empty experts": 4}[load]


def test_gradcheck_of_the_gate() -> None:
    moe = layer(experts=3)
    x = torch.randn(4, 32).double()

    def run(router: Tensor, x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(moe, {"router": router}, (x,))
        return out

    assert torch.autograd.gradcheck(run, (moe.router.detach().requires_grad_(), x.requires_grad_()))


def test_a_token_does_not_depend_on_the_others() -> None:
    moe = layer()
    x = torch.randn(100, 32).double()
    whole = moe(x)
    torch.testing.assert_close(moe(x[17:18]), whole[17:18], rtol=0, atol=1e-12)
    torch.testing.assert_close(moe(x.view(4, 25, 32)), whole.view(4, 25, 48))


def test_evaluation_computes_what_training_does() -> None:
    moe = layer()
    x = torch.randn(100, 32).double()
    torch.testing.assert_close(moe.eval()(x), moe.train()(x), rtol=0, atol=0)


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_the_first_step_spreads_the_tokens(shift: float) -> None:
    moe = el.MoELinear(64, 64, "btt", experts=16, active=2)
    assert not moe.router.any()
    x = torch.randn(4096, 64) + shift
    moe(x)
    load = el.moe_loads(moe)[""]
    assert sum(load.counts) == 2 * 4096
    assert load.entropy > 0.99
    assert load.largest < 1.5
    assert moe.last is not None
    torch.testing.assert_close(moe.last.gates, torch.full((4096, 2), 0.5))
    assert torch.equal(moe.last.indices, moe.route(x).indices)
    assert not torch.equal(moe.last.indices[:-1].sort().values, moe.last.indices[1:].sort().values)


def test_experts_start_as_layers_of_their_own() -> None:
    moe = el.MoELinear(64, 1024, "btt", experts=8)
    alone = el.Linear(64, 1024, "btt")
    for name, parameter in alone.named_parameters():
        if name != "bias":
            assert getattr(moe, name).std().item() == pytest.approx(parameter.std().item(), rel=0.2)
            assert getattr(moe, name).shape == (8, *parameter.shape)


def test_macs_are_those_of_active_experts_and_the_router() -> None:
    moe = el.MoELinear(64, 256, "btt", experts=8, active=2)
    assert macs_per_token(moe) == 2 * el.structure("btt", 64, 256).macs + 8 * 64
    block = MoEFeedForward(64, experts=8, active=2)
    assert macs_per_token(block) == 2 * 2 * 64 * 256 + 8 * 64


@pytest.mark.parametrize("routed", ["linear", "feed_forward", "both"])
def test_learning_rates_of_a_dense_base(routed: str) -> None:
    """A mixture needs no base of its own: its parts learn as in a dense model, the router as any matrix."""
    sizes = {"vocab": 96, "context": 16, "depth": 1, "d_head": 16}
    model = GPT(width=64, structure="btt", normalize=True, experts=4, routed=routed, **sizes)
    plain = GPT(width=64, structure="btt", normalize=True, **sizes)
    base = GPT(width=32, **sizes)
    mults, expected = (
        {name: group["lr_mult"] for group in el.param_groups(m, 1e-3, base=base) for name in group["param_names"]}
        for m in (model, plain)
    )
    for name, mult in mults.items():
        assert mult == (0.5 if name.endswith("router") else expected[name])
    assert sum(name.endswith("router") for name in mults) == {"linear": 6, "feed_forward": 1, "both": 5}[routed]
    el.init_(model, base=base, zero=model.ZERO)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("router"))
    assert not model.blocks[0].feed_forward.fc2.B.any()
    assert model.blocks[0].feed_forward.fc2.A.any()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_weight_decay_and_optimizers(optimizer: str) -> None:
    moe, base = el.MoELinear(64, 64, "btt", experts=4, normalize=True), nn.Linear(32, 32)
    groups = el.param_groups(moe, 1e-3, base=base, optimizer=optimizer, weight_decay=0.1)
    decays = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    assert {name for name, decay in decays.items() if decay} == {"A", "B", "router"}
    if optimizer == "muon":
        one = el.param_groups(el.Linear(64, 64, "btt"), 1e-3, base=base, optimizer="muon")
        sizes = {
            name: group["update_scale"] for group in one for name in group["param_names"] if "update_scale" in group
        }
        for group in groups:
            for name in {"A", "B"} & set(group["param_names"]):
                assert group["update_scale"] == sizes[name]
                assert group["matrix_view"][0][0] == 0


@pytest.mark.parametrize("bad", [0, -1])
def test_too_few_experts(bad: int) -> None:
    with pytest.raises(ValueError, match=f"experts must be at least 1, not {bad}"):
        el.MoELinear(16, 16, "btt", experts=bad)


def test_wrong_numbers_of_active_experts() -> None:
    for active, message in ((0, "active must be at least 1, not 0"), (5, "active=5: .* 4 experts")):
        with pytest.raises(ValueError, match=message):
            el.MoELinear(16, 16, "btt", experts=4, active=active)
        with pytest.raises(ValueError, match=message):
            GPT(96, 32, 16, d_head=16, experts=4, active=active)
    with pytest.raises(ValueError, match="routed must be linear or feed_forward or both, not 'mlp'"):
        GPT(96, 32, 16, d_head=16, experts=4, routed="mlp")


def test_structures_that_do_not_fit_or_exist() -> None:
    with pytest.raises(ValueError, match="bttt"):
        el.MoELinear(16, 16, "bttt")
    with pytest.raises(ValueError, match="blocks"):
        el.MoELinear(16, 16, "monarch(blocks=40)")
    with pytest.raises(ValueError, match="the structure is of 16 -> 24 features, the layer of 16 -> 16"):
        el.MoELinear(16, 16, el.structure("btt", 16, 24))
    with pytest.raises(TypeError):
        el.MoELinear(16, 16, nn.Linear(16, 16))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="in_features=16"):
        el.MoELinear(16, 16, "btt")(torch.randn(2, 15))


def test_a_token_that_is_not_a_number() -> None:
    model = nn.Sequential(nn.Linear(32, 32), el.MoELinear(32, 32, "btt", experts=4))
    x = torch.randn(50, 32)
    x[7, 3] = torch.nan
    y = model(x)
    assert y[7].isnan().all()
    assert y.isnan().any(1).sum() == 1
    with pytest.raises(ValueError, match=r"^1: .*NaN or infinite"):
        el.moe_loss(model)


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "threads"), [(4_000, 1), (500, 2)])
def test_thousands_of_steps_of_adversarial_routing(steps: int, threads: int) -> None:
    """All tokens on one expert, alternating ones, a NaN now and then: it runs, and memory does not grow."""
    torch.manual_seed(0)
    moe = el.MoELinear(16, 16, "btt", experts=8, active=1)
    optimizer = torch.optim.SGD(moe.parameters(), lr=1e-3)
    x = torch.randn(32, 16)
    x[:, 0] = 1
    before, peak = torch.get_num_threads(), 0
    torch.set_num_threads(threads)
    try:
        for step in range(steps):
            with torch.no_grad():
                moe.router.zero_()
                moe.router[step % 8 if step % 3 else 0, 0] = 100
            inputs = x.index_fill(0, torch.tensor([step % 32]), torch.nan) if step % 100 == 99 else x
            y = moe(inputs)
            if inputs is not x:
                with pytest.raises(ValueError, match="NaN or infinite"):
                    el.moe_loss(moe)
                continue
            (y.square().mean() + 0.01 * el.moe_loss(moe)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == steps // 5:
                gc.collect()
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        gc.collect()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 4096  # kibibytes
        assert all(p.isfinite().all() for p in moe.parameters())
    finally:
        torch.set_num_threads(before)


def test_checkpointed_activations_are_freed() -> None:
    moe = layer()
    x = torch.randn(20, 32).double()
    y = checkpoint(moe, x, use_reentrant=False)
    routing = moe.last
    (y.square().mean() + el.moe_loss(moe)).backward()
    assert moe.last is routing  # not that of the second computation
    found = [p.grad for p in moe.parameters()]
    moe.zero_grad()
    (moe(x).square().mean() + el.moe_loss(moe)).backward()
    for p, grad in zip(moe.parameters(), found, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_on_the_meta_device() -> None:
    assert el.MoELinear(16, 24, "btt", device="meta")(torch.empty(3, 16, device="meta")).shape == (3, 24)


def test_no_tokens_have_no_loss() -> None:
    moe = layer()
    assert moe(torch.randn(0, 32).double()).shape == (0, 48)
    assert el.moe_loss(moe).item() == 0


def test_copies_files_and_compilation(tmp_path: Path) -> None:
    model = GPT(96, 32, 16, depth=1, d_head=16, structure="btt", normalize=True, experts=4)
    tokens = torch.randint(96, (2, 16))
    y = model(tokens)
    other = copy.deepcopy(model)  # though its last routing hangs in a graph
    torch.testing.assert_close(other(tokens), y)
    again = GPT(96, 32, 16, depth=1, d_head=16, structure="btt", normalize=True, experts=4)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    torch.testing.assert_close(again(tokens), y)
    with pytest.raises(RuntimeError, match=r"monarch.*saved as btt"):
        el.MoELinear(16, 16, "monarch(blocks=4)").load_state_dict(el.MoELinear(16, 16, "btt").state_dict())
    compiled = torch.compile(other, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), y, rtol=1e-4, atol=1e-4)
    loss = compiled(tokens).square().mean() + el.moe_loss(compiled)
    loss.backward()
    (model(tokens).square().mean() + el.moe_loss(model)).backward()
    for (name, a), b in zip(other.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_experts_without_a_router() -> None:
    stack = Experts(16, 24, "btt", experts=3).double()
    x, experts = torch.randn(10, 16).double(), torch.randint(3, (10, 1))
    y = stack(x, experts, torch.full((10, 1), 2.0).double())
    for token, (e,), row in zip(x, experts, y, strict=True):
        matrix = ops.dense_weight(stack.structure, [factor[e] for factor in stack.factors()])
        torch.testing.assert_close(row, 2 * matrix @ token)


def test_feed_forward_is_the_weighted_sum_of_networks() -> None:
    block = MoEFeedForward(16, experts=3, active=2, structure="btt", multiplier=0.5).double()
    with torch.no_grad():
        block.router.normal_()
    x = torch.randn(2, 5, 16).double()
    tokens = block.norm(x).view(-1, 16)
    routing = block.route(tokens)
    matrices = [
        [ops.dense_weight(stack.structure, [f[e] for f in stack.factors()]) for stack in (block.fc1, block.fc2)]
        for e in range(3)
    ]
    expected = torch.stack(
        [
            sum(
                gate * (matrices[e][1] @ nn.functional.gelu(matrices[e][0] @ token))
                for gate, e in zip(gates, experts, strict=True)
            )
            for token, gates, experts in zip(tokens, routing.gates, routing.indices.tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(block(x), x + 0.5 * expected.view(2, 5, 16))
