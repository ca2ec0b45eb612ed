"""`FeedForward`: which blocks run fused, and that nobody can tell except by the clock and the memory."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.nn.utils import parametrize

import einlinear as el
from einlinear import ops
from einlinear.nn.feed_forward import weights_of
from einlinear.ops.cpu import fused_block


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes that ran fused."""
    why = ops.reason_unsupported("cpu", el.structure("dense", 2, 2), torch.float64, "cpu")
    if why is not None:
        pytest.skip(why)  # where CI=true, test_cpu.py fails
    passes: list[str] = []
    for name in ("forward", "backward"):
        function = getattr(fused_block, name)

        def run(*args: Any, name: str = name, function: Callable[..., Any] = function) -> Any:
            passes.append(name)
            return function(*args)

        monkeypatch.setattr(fused_block, name, run)
    return passes


def make(structure: Any = "btt", **config: Any) -> el.FeedForward:
    return el.FeedForward(48, 96, structure, dtype=torch.float64, **config)


def draw(tokens: int = 40) -> Tensor:
    return torch.randn(tokens, 48, dtype=torch.float64)


def by_layers(block: el.FeedForward, x: Tensor) -> Tensor:
    """What the block computes, written out."""
    act = ops.ACTIVATIONS[block.activation] if isinstance(block.activation, str) else block.activation
    with el.backend("reference"):
        hidden = act(block.up(x)) if block.gate is None else act(block.gate(x)) * block.up(x)
        y: Tensor = block.down(hidden)
    return y + x if block.residual else y


def results(run: Callable[[Tensor], Tensor], x: Tensor, block: nn.Module) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = run(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


MIXED = {"up": "btt(rank=2)", "gate": "low_rank(rank=8)", "down": "monarch(blocks=4)"}


@pytest.mark.parametrize("structure", ["dense", "dyad(blocks=2)", "monarch", MIXED])
@pytest.mark.parametrize("normalize", [False, True])
def test_blocks_run_fused(structure: Any, normalize: bool, fused: list[str]) -> None:
    for gated, bias, residual in itertools.product((False, True), repeat=3):
        by_name = structure
        if isinstance(structure, dict) and not gated:
            by_name = {name: spec for name, spec in structure.items() if name != "gate"}
        config = {"gated": gated, "bias": bias, "residual": residual, "normalize": normalize}
        block, x = make(by_name, activation="silu", **config), draw()
        for p in block.parameters():
            p.data.mul_(2)  # so that factors are normalised
        assert "fused" in el.explain(block, x).reason
        found = results(block, x, block)
        assert fused == ["forward", "backward"]
        assert_equal(found, results(partial(by_layers, block), x, block))
        fused.clear()


def test_sizes_and_names() -> None:
    block = el.FeedForward(20, 60, "low_rank(rank=2)", gated=True, bias=False, out_features=30)
    assert (block.in_features, block.hidden_features, block.out_features) == (20, 60, 30)
    assert [*block.state_dict()] == [f"{layer}.{factor}" for layer in ("up", "gate", "down") for factor in "AB"]
    assert block(torch.randn(2, 3, 20)).shape == (2, 3, 30)
    assert [*dict(make(dropout=0.1).named_children())] == ["up", "down", "dropout"]
    assert {p.dtype for p in make(device="meta").parameters()} == {torch.float64}
    assert make(device="meta")(draw().to("meta")).shape == (40, 48)
    assert make({"up": el.structure("btt", 48, 96), "down": "dense"}).up.structure.spec == "btt"


def test_activations_by_name_or_function(fused: list[str]) -> None:
    x = draw()
    for activation, name in ((F.gelu, "gelu"), (nn.SiLU(), "silu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.ReLU, "relu")):
        block = make(activation=activation)
        assert block.activation == name
        block(x)
    assert fused == ["forward"] * 4
    for activation in (F.elu, nn.ELU(), lambda x: x.sin()):
        block = make(activation=activation)
        assert block.activation is activation
        assert "fused blocks have no such activation" in el.explain(block, x).reason
        torch.testing.assert_close(block(x), by_layers(block, x))
    prelu = make(activation=nn.PReLU(dtype=torch.float64))
    assert "activation.weight" in prelu.state_dict()
    watched, seen = nn.GELU(), list[int]()
    watched.register_forward_hook(lambda *_: seen.append(1))
    make(activation=watched)(x)
    assert seen == [1]
    assert fused == ["forward"] * 4


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="unknown activation 'swish': choose identity"):
        make(activation="swish")
    with pytest.raises(TypeError, match=r"activation must be a function or one of identity, .*, not 3"):
        make(activation=3)
    with pytest.raises(ValueError, match=r"structure has the keys \['up'\], but gated=False needs \['up', 'down'\]"):
        make({"up": "btt"})
    with pytest.raises(ValueError, match="but gated=False needs"):
        make(MIXED)
    with pytest.raises(ValueError, match="but gated=True needs"):
        make({"up": "btt", "gate": "btt", "out": "btt"}, gated=True)
    with pytest.raises(ValueError, match="residual=True adds the 48 inputs to as many outputs, not to 50"):
        make(residual=True, out_features=50)
    with pytest.raises(ValueError, match="dropout probability"):
        make(dropout=2.0)
    with pytest.raises(ValueError, match="unknown family 'bt'"):
        make("bt")
    with pytest.raises(RuntimeError, match="in_features=48"):
        make()(torch.randn(20, 47))
    block = make()
    block.down.float()
    with pytest.raises(RuntimeError, match=r"down: the input is of torch.float64, but the layer of torch.float32"):
        block(draw())


def test_repr() -> None:
    text = "in_features=48, hidden_features=96, out_features=48, activation='gelu'"
    assert make().extra_repr() == text
    assert make(residual=True).extra_repr() == f"{text}, residual=True"
    assert "activation='elu'" in make(activation=F.elu).extra_repr()
    assert "activation" not in make(activation=nn.ELU()).extra_repr()


HOOKS: dict[str, Callable[[Any, Callable[..., None]], Any]] = {
    "forward": lambda layer, hook: layer.register_forward_hook(hook),
    "forward, pre": lambda layer, hook: layer.register_forward_pre_hook(hook),
    "backward": lambda layer, hook: layer.register_full_backward_hook(hook),
    "backward, pre": lambda layer, hook: layer.register_full_backward_pre_hook(hook),
    "of all modules": lambda layer, hook: nn.modules.module.register_module_forward_hook(
        lambda module, *_: hook() if module is layer else None
    ),
}


@pytest.mark.parametrize("name", ["up", "gate", "down", "dropout"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_layers_run(kind: str, name: str, fused: list[str]) -> None:
    block, x, seen = make(gated=True, dropout=0.1).eval(), draw().requires_grad_(), list[int]()
    handle = HOOKS[kind](getattr(block, name), lambda *_: seen.append(1))
    try:
        block(x).sum().backward()
        reason = el.explain(block, x).reason
    finally:
        handle.remove()
    assert seen == [1]
    assert fused == []
    assert reason.endswith(("has hooks", "dropout of hidden features is active"))
    block(x).sum().backward()
    assert fused == ["forward", "backward"]


def test_hooks_of_the_block_run_around_it(fused: list[str]) -> None:
    block, seen = make(), list[torch.Size]()
    block.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    block(draw())
    assert (seen, fused) == ([(40, 48)], ["forward"])


class Doubled(el.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Scaled(el.Linear):
    """Computes its factors."""

    def factors(self) -> list[Tensor]:
        return [3 * factor for factor in super().factors()]


class Subclass(el.Linear):
    """As FSDP2 makes of a layer."""


def test_layers_that_do_something_else(fused: list[str]) -> None:
    x = draw()
    for make_layer in (Doubled, lambda *args, **config: nn.Linear(*args[:2], **config)):
        block = make()
        block.up = make_layer(48, 96, "btt", dtype=torch.float64)
        assert el.explain(block, x).reason.endswith("up is not a plain einlinear.Linear")
        torch.testing.assert_close(block(x), by_layers(block, x))
    block = make()
    block.down.forward = lambda hidden: hidden[:, :48]  # type: ignore[method-assign]
    torch.testing.assert_close(block(x), F.gelu(block.up(x))[:, :48])
    assert fused == []
    for cls in (Scaled, Subclass):
        block = make()
        block.up = cls(48, 96, "btt", dtype=torch.float64)
        assert_equal(results(block, x, block), results(partial(by_layers, block), x, block))
    assert fused == ["forward", "backward"] * 2


def test_parametrized_factors_are_used(fused: list[str]) -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    block, x = make(), draw()
    parametrize.register_parametrization(block.up, "A", Double())
    assert_equal(results(block, x, block), results(partial(by_layers, block), x, block))
    assert fused == ["forward", "backward"]


def test_dropout_of_hidden_features(fused: list[str]) -> None:
    block, x = make(dropout=0.5, activation="identity"), draw()
    assert "dropout of hidden features is active" in el.explain(block, x).reason
    torch.manual_seed(1)
    y = block(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y, block.down(F.dropout(block.up(x), 0.5)))
    assert fused == []
    torch.testing.assert_close(block.eval()(x), by_layers(block, x))
    assert fused == ["forward"]
    block.dropout.train()  # as for Monte-Carlo dropout
    assert not torch.equal(block(x), block(x))
    assert fused == ["forward"]


def test_explain() -> None:
    block, x = make(), draw()
    choice = el.explain(block, x)
    assert choice.backend == "cpu"
    assert choice.reason == "fused: a tile of tokens passes through all layers while it is in cache"
    assert choice.kernels
    few = el.explain(block, x[:3])
    assert few.reason.startswith("one layer after the other (up: ")
    assert few.reason.endswith("): fewer than 16 tokens are faster layer by layer")
    with el.backend("batched"):
        choice = el.explain(block, x)
    assert choice.backend == "batched"
    assert choice.reason.startswith("one layer after the other (up: batched, down: batched): the backend 'batched' is")
    with torch.autocast("cpu", torch.bfloat16):
        assert el.explain(block.float(), x.float()).kernels
    assert "it runs on the CPU, not on meta" in el.explain(make(device="meta"), x.to("meta")).reason
    el.densify(block)
    assert el.explain(block, x).reason == "one layer after the other (): up is not a plain einlinear.Linear"
    with pytest.raises(TypeError, match=r"expected an einlinear.Linear or FeedForward, not ReLU"):
        el.explain(nn.ReLU(), x)


def test_copies_and_files(fused: list[str]) -> None:
    block, x = make(MIXED, gated=True, residual=True), draw()
    y = block(x)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        torch.testing.assert_close(other(x), y)
    loaded = make(MIXED, gated=True, residual=True)
    loaded.load_state_dict(block.state_dict())
    torch.testing.assert_close(loaded(x), y)
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    with pytest.raises(RuntimeError, match=r"up is btt, but was saved as btt\(rank=2\)|size mismatch"):
        make(gated=True).load_state_dict(block.state_dict())
    assert fused == ["forward"] * 4


def test_learning_rates_and_initialisation() -> None:
    block, base = make(), el.FeedForward(12, 24, "dense", device="meta")
    rates = {
        name: group["lr_mult"] for group in el.param_groups(block, 1e-3, base=base) for name in group["param_names"]
    }
    assert {*rates} == {name for name, _ in block.named_parameters()}
    alone = el.param_groups(block.up, 1e-3, base=el.Linear(12, 24, "dense", device="meta"))
    assert rates["up.A"] == next(group["lr_mult"] for group in alone if "A" in group["param_names"])
    before = block.up.A.clone()
    el.init_(block, base=base)
    assert not torch.equal(block.up.A, before)
    assert el.base_shapes(block)["down.weight"] == [48, 96]


def test_conversion(fused: list[str]) -> None:
    block, x = make("btt", gated=True), draw()
    y = block(x)
    el.densify(block)
    assert type(block.up) is type(block.gate) is nn.Linear
    torch.testing.assert_close(block(x), y)
    assert fused == ["forward"]
    model = nn.Sequential(block)
    report = el.convert(model, {"*.down": "low_rank(rank=4)", "*": "btt"}, weights="project", example_input=x)
    assert [c.name for c in report.converted] == ["0.up", "0.gate", "0.down"]
    torch.testing.assert_close(model(x), by_layers(block, x))
    assert fused == ["forward"] * 2
    el.densify(model)
    assert len(el.convert(model, "btt").converted) == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own
def test_compile(fused: list[str]) -> None:
    torch._dynamo.reset()
    for gated in (False, True):
        block, x = make(MIXED if gated else "btt", gated=gated, residual=True), draw()
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        expected = results(partial(by_layers, block), x, block)
        assert_equal(results(compiled, x, block), expected)
        assert fused == ["forward", "backward"]
        fused.clear()
    block.up.register_forward_hook(lambda *_: None)
    torch._dynamo.reset()
    assert_equal(results(torch.compile(block, backend="aot_eager"), x, block), expected)
    assert fused == []


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_exports(fused: list[str]) -> None:
    block, x, longer = make(MIXED, gated=True, normalize=True), draw(), draw(70)
    expected = by_layers(block, longer)
    shapes = ({0: torch.export.Dim("tokens", min=2, max=512)},)
    for strict in (False, True):
        program = torch.export.export(block, (x,), dynamic_shapes=shapes, strict=strict)
        torch.testing.assert_close(program.module()(longer), expected)
    traced = torch.jit.trace(block, (x,), check_trace=False)
    torch.testing.assert_close(traced(longer), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(block)(longer), expected)
    assert fused == []


def test_functional_calls_and_transforms(fused: list[str]) -> None:
    block, x = make(gated=True), draw()
    parameters = {name: 2 * p.detach() for name, p in block.named_parameters()}
    other = make(gated=True)
    other.load_state_dict(parameters)
    torch.testing.assert_close(functional_call(block, parameters, (x,)), other(x))
    assert fused == ["forward"] * 2

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = functional_call(block, parameters, (x,)).square().sum()
        return out

    per_sample = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    other(x).square().sum().backward()
    for name, p in other.named_parameters():
        torch.testing.assert_close(per_sample[name].sum(0), p.grad)


def test_autocast(fused: list[str]) -> None:
    block, x = el.FeedForward(256, 512, "btt", residual=True), torch.randn(40, 256)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, block(x), rtol=0.05, atol=0.05)
    y.sum().backward()
    assert fused == ["forward", "forward", "backward"]
    assert {p.grad.dtype for p in block.parameters() if p.grad is not None} == {torch.float32}


def test_training_needs_no_memory_for_hidden_features() -> None:
    def saved(block: nn.Module) -> int:
        sizes = dict[int, int]()
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: (sizes.setdefault(t.data_ptr(), t.numel()), t)[1], lambda t: t
        )
        x = torch.randn(1000, 64)
        with hooks:
            y = block(x)
        del y
        return sum(sizes.values())

    block = el.FeedForward(64, 256, "btt")
    assert saved(block) == 1000 * 64 + sum(p.numel() for p in block.parameters())
    dense = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    assert saved(dense) == 1000 * (64 + 256 + 256) + 256 * 64


def test_frozen_blocks_are_fused_as_in_inference(fused: list[str]) -> None:
    """Too large to be trained with so few tokens."""
    block = el.FeedForward(2048, 8192, "btt(rank=4)").requires_grad_(False)
    x = torch.randn(64, 2048)
    block(x)
    assert fused == ["forward"]
    assert "needs 1,024 tokens" in str(block.reason_not_to_fuse(x.requires_grad_()))
    assert "needs 1,024 tokens" in str(block.requires_grad_().reason_not_to_fuse(x.detach()))


def test_weights_of_a_layer() -> None:
    layer = el.Linear(16, 24, "btt", normalize=True)
    layer.A.data.mul_(10)
    weights = weights_of(layer)
    assert (weights.structure, weights.bias) == (layer.structure, layer.bias)
    assert not torch.equal(weights.factors[0], layer.A)
    torch.testing.assert_close(ops.dense_weight(layer.structure, weights.factors), layer.dense_weight())


@pytest.fixture
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.parametrize("wrap", ["DDP", "FSDP2 of the block", "FSDP2 of every layer"])
def test_data_parallelism(wrap: str, process_group: None, fused: list[str]) -> None:
    block, x = make(gated=True, residual=True), draw()
    expected = results(partial(by_layers, block), x, block)
    model: nn.Module = block
    if wrap == "DDP":
        model = nn.parallel.DistributedDataParallel(block)
    else:
        mesh = init_device_mesh("cpu", (1,))
        for layer in (block.up, block.gate, block.down) if "layer" in wrap else ():
            fully_shard(layer, mesh=mesh)  # type: ignore[arg-type]
        fully_shard(block, mesh=mesh)
    x = x.requires_grad_()
    y = model(x)
    y.square().sum().backward()
    grads = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters()]
    assert_equal([y.detach(), x.grad, *grads], expected)  # type: ignore[list-item]
    # layers that are wrapped themselves gather their parameters when they are called
    assert fused == ([] if "layer" in wrap else ["forward", "backward"])
