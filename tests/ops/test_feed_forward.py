"""Fused feed-forward blocks: the numbers of the layers one after the other, for whatever runs and looks at them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.families import SAMPLES
from tests.random_patterns import random_structure
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import einlinear as el
from einlinear import ops
from einlinear.ops import feed_forward_structure, fused_dispatch
from einlinear.ops.activation_functions import name_of
from einlinear.ops.cpu import cpu_backend, fused_block
from einlinear.structures import DoesNotFit, Structure

SPECS = [specs[-1] for specs in SAMPLES.values()]
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}


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


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Threads that share even the smallest call."""
    monkeypatch.setattr(cpu_backend, "PARALLEL_MACS", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Case:
    """A block with its input and the gradient of its output, in float64, rounded to a dtype."""

    def __init__(
        self,
        structures: Sequence[Structure],
        activation: str = "gelu",
        tokens: int = 40,
        bias: bool = True,
        residual: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=dtype)

        self.names = ("up", "gate", "down") if len(structures) == 3 else ("up", "down")
        self.structures, self.activation, self.residual = structures, activation, residual
        self.tensors = [draw(tokens, structures[0].in_features)]
        self.sizes = []
        for s in structures:
            self.tensors += [draw(*f.shape) / f.fan_in**0.5 for f in s.factors] + [draw(s.out_features)] * bias
            self.sizes.append((len(s.factors), bias))
        self.grad = draw(tokens, structures[-1].out_features)

    def output(self, tensors: Sequence[Any], backend: str | None) -> Tensor:
        x, rest, weights = tensors[0], iter(tensors[1:]), {}
        for name, structure, (factors, bias) in zip(self.names, self.structures, self.sizes, strict=True):
            drawn = [next(rest) for _ in range(factors)]
            weights[name] = ops.Weights(structure, drawn, next(rest) if bias else None)
        return ops.feed_forward(x, **weights, activation=self.activation, residual=self.residual, backend=backend)

    def run(self, backend: str | None, dtype: torch.dtype, wanted: Sequence[bool] = ()) -> list[Tensor]:
        """The output, and the gradients that are wanted: by default all."""
        wanted = wanted or [True] * len(self.tensors)
        tensors = [t.detach().to(dtype).requires_grad_(needs) for t, needs in zip(self.tensors, wanted, strict=True)]
        y = self.output(tensors, backend)
        leaves = [t for t in tensors if t.requires_grad]
        return [y.detach(), *(torch.autograd.grad(y, leaves, self.grad.to(dtype)) if leaves else ())]


def errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(found, exact, strict=True)]


def compare(case: Case, fused: list[str], dtype: torch.dtype) -> None:
    with el.backend("reference"):
        exact = case.run(None, torch.float64)
    assert fused == []
    found = case.run("cpu", dtype)
    assert fused == ["forward", "backward"]
    fused.clear()
    assert {t.dtype for t in found} == {dtype}
    worst = max(errors(found, exact))
    assert worst < EXACT[dtype], f"{worst:.2g}: {case.structures}, {case.activation}"


def layers(spec: str, gated: bool = False, sizes: tuple[int, int, int] = (48, 96, 48)) -> list[Structure]:
    up, down = el.structure(spec, *sizes[:2]), el.structure(spec, *sizes[1:])
    return [up, up, down] if gated else [up, down]


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_every_activation(activation: str, gated: bool, dtype: torch.dtype, threads: int, fused: list[str]) -> None:
    for bias, residual, tokens in itertools.product((False, True), (False, True), (17, 100)):
        compare(Case(layers("btt", gated), activation, tokens, bias, residual), fused, dtype)


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_every_family(spec: str, gated: bool, dtype: torch.dtype, threads: int, fused: list[str]) -> None:
    fitting = 0
    # the second is padded
    for sizes in ((48, 96, 32), (37, 74, 41)):
        try:
            structures = layers(spec, gated, sizes)
        except DoesNotFit:
            continue
        fitting += 1
        for tokens in (1, 15, 17, 64, 100):
            compare(Case(structures, "silu", tokens), fused, dtype)
    assert fitting


def test_random_sums(threads: int, fused: list[str]) -> None:
    """Blocks of mixed structures that nobody chose, of one to three terms, some of it padded."""
    by_sizes: dict[tuple[int, int], list[Structure]] = {}
    for seed in range(400):
        structure = random_structure(seed)
        by_sizes.setdefault((structure.in_features, structure.out_features), []).append(structure)
    random, activations = Random(threads), [*ops.ACTIVATIONS]
    for _ in range(60):
        first = random.choice([sizes for sizes in by_sizes if len(by_sizes[sizes]) > 1])
        second = random.choice([sizes for sizes in by_sizes if sizes[0] == first[1]])
        structures = [*random.sample(by_sizes[first], random.choice((1, 2))), random.choice(by_sizes[second])]
        dtype, tokens = random.choice([*EXACT]), random.choice((1, 15, 17, 64, 100))
        residual = first[0] == second[1] and random.random() < 0.5
        compare(Case(structures, random.choice(activations), tokens, random.random() < 0.5, residual), fused, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
def test_half_precision_is_as_exact_as_dense_layers(activation: str, gated: bool, dtype: torch.dtype) -> None:
    sizes, act = (256, 512, 256), ops.ACTIVATIONS[activation]
    for spec, tokens in itertools.product(("btt(rank=2)", "low_rank(rank=32)", "monarch"), (17, 100)):
        # the same numbers in float64, so that their rounding is no error
        case = Case(layers(spec, gated, sizes), activation, tokens, dtype=dtype)
        with el.backend("reference"):
            exact = case.run(None, torch.float64)
        y, dx, *weights = errors(case.run("cpu", dtype), exact)

        def dense(dtype: torch.dtype, case: Case = case) -> list[Tensor]:
            torch.manual_seed(1)
            in_features, hidden, out = sizes
            made = [nn.Linear(in_features, hidden), nn.Linear(in_features, hidden), nn.Linear(hidden, out)]
            up, gate, down = (layer.to(case.grad.dtype).to(dtype) for layer in made)
            x = case.tensors[0].to(dtype).requires_grad_()
            y = down(act(gate(x)) * up(x) if gated else act(up(x)))
            parameters = [p for layer in ((up, gate, down) if gated else (up, down)) for p in layer.parameters()]
            return [y.detach(), *torch.autograd.grad(y, [x, *parameters], case.grad.to(dtype))]

        y_dense, dx_dense, *weights_dense = errors(dense(dtype), dense(torch.float64))
        assert y <= 1.5 * y_dense
        assert dx <= 1.5 * dx_dense
        assert max(weights) <= 1.5 * max(weights_dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_special_numbers_are_those_of_torch(activation: str, dtype: torch.dtype) -> None:
    """NaN and infinities, large and tiny numbers, through layers that change none of them."""
    special = [torch.nan, torch.inf, -torch.inf, 0.0, 1e30, -1e30, 1e4, -1e4, 30.0, -30.0, 9.0, -6.0, 1e-30, -1e-30]
    x = torch.tensor(special).to(dtype).repeat(20, 1).requires_grad_()
    # half precision is rounded once
    exact = x.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    identity = ops.Weights(el.structure("i, i -> i", len(special), len(special)), [torch.ones(len(special)).to(dtype)])
    y = ops.feed_forward(x, identity, identity, activation=activation, backend="cpu")
    expected = ops.ACTIVATIONS[activation](exact)
    close = {"rtol": max(1e-5, torch.finfo(dtype).eps), "atol": 1e-6}
    torch.testing.assert_close(y, expected.to(dtype), equal_nan=True, **close)
    (found,) = torch.autograd.grad(y, x, torch.ones_like(x))
    (wanted,) = torch.autograd.grad(expected, exact, torch.ones_like(exact))
    # derivatives at infinity are anything
    finite = ~expected[0].isinf() & ~x[0].isinf()
    torch.testing.assert_close(found[:, finite], wanted[:, finite].to(dtype), equal_nan=True, **close)


def test_every_subset_of_gradients(threads: int) -> None:
    random = Random(0)
    for gated, residual in itertools.product((False, True), (False, True)):
        case = Case(layers("btt", gated), "gelu", 40, residual=residual)
        count = len(case.tensors)
        with el.backend("reference"):
            exact = case.run(None, torch.float64)
        subsets = [[i == j for j in range(count)] for i in range(count)]
        subsets += [[random.random() < 0.5 for _ in range(count)] for _ in range(30)]
        for wanted in [*subsets, [False] * count]:
            found = case.run("cpu", torch.float64, wanted)
            expected = [exact[0], *(grad for grad, needs in zip(exact[1:], wanted, strict=True) if needs)]
            assert max(errors(found, expected)) < 1e-12


UNUSUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "every other": lambda t: torch.stack([t, t], -1)[..., 0],
    "negated later": lambda t: torch._neg_view(-t),
    "part of a larger one": lambda t: torch.cat([t, t])[len(t) :],
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_operands(kind: str, fused: list[str]) -> None:
    case = Case(layers("btt(rank=2)", gated=True))
    expected = case.run("cpu", torch.float64)
    leaves = [t.clone().requires_grad_() for t in case.tensors]
    y = case.output([UNUSUAL[kind](t) for t in leaves], "cpu")
    found = [y.detach(), *torch.autograd.grad(y, leaves, UNUSUAL[kind](case.grad))]
    assert max(errors(found, expected)) < 1e-12
    assert fused == ["forward", "backward"] * 2


@pytest.mark.parametrize("shape", [(), (1,), (40,), (2, 0, 4), (2, 3, 5)])
def test_any_leading_shape(shape: tuple[int, ...], fused: list[str]) -> None:
    case = Case(layers("btt"), residual=True)
    x = torch.randn(*shape, 48, dtype=torch.float64, requires_grad=True)
    tensors = [t.clone().requires_grad_() for t in case.tensors[1:]]
    y, expected = (case.output([x, *tensors], backend) for backend in ("cpu", "reference"))
    assert y.shape == (*shape, 48)
    torch.testing.assert_close(y, expected)
    found, wanted = (torch.autograd.grad(out.square().sum(), [x, *tensors]) for out in (y, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert fused == ["forward", "backward"]


def test_training_saves_x_and_the_weights_alone() -> None:
    case = Case(layers("btt", gated=True, sizes=(64, 256, 64)), tokens=100)

    def saved(backend: str | None) -> int:
        sizes = dict[int, int]()
        tensors = [t.clone().requires_grad_() for t in case.tensors]
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: (sizes.setdefault(t.data_ptr(), t.numel()), t)[1], lambda t: t
        )
        with hooks:
            y = case.output(tensors, backend)
        del y
        return sum(sizes.values())

    operands = sum(t.numel() for t in case.tensors)
    assert saved(None) == operands
    # both layers put out hidden features, and so does the activation
    assert saved("reference") > operands + 3 * 100 * 256


def test_derivatives_of_derivatives() -> None:
    for gated, activation in ((False, "gelu"), (True, "silu"), (False, "relu_squared")):
        case = Case(layers("btt", gated, (4, 6, 4)), activation, 3, residual=True)
        tensors = [t.requires_grad_() for t in case.tensors]

        def function(*tensors: Tensor, case: Case = case) -> Tensor:
            return case.output(tensors, "cpu")

        checks = {"check_batched_grad": True, "fast_mode": True}
        assert gradcheck(function, tensors, **checks)
        assert gradgradcheck(function, tensors, **checks)


def test_gradients_of_gradients_where_one_input_follows_from_another() -> None:
    case = Case(layers("low_rank(rank=3)", sizes=(6, 6, 6)), bias=False, tokens=20)
    x = case.tensors[0].requires_grad_()

    def gradient(backend: str) -> tuple[Tensor, Tensor]:
        factors = [x[:3].sin(), x[:3].T.cos()]
        y = case.output([x, *factors, *factors], backend)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return first, torch.autograd.grad(first.square().sum(), x)[0]

    for found, wanted in zip(gradient("cpu"), gradient("reference"), strict=True):
        torch.testing.assert_close(found, wanted)


def operator_arguments(case: Case) -> tuple[Any, ...]:
    sizes = [s.out_features for s in (case.structures[0], case.structures[-1])]
    specs, has_bias = [s.spec for s in case.structures], [bias for _, bias in case.sizes]
    return case.tensors[1:], specs, sizes, has_bias, case.activation, case.residual, "cpu"


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(gated: bool, bias: bool) -> None:
    case = Case(layers("btt", gated), "silu", 20, bias, residual=True)
    x, arguments = case.tensors[0], operator_arguments(case)
    for t in case.tensors:
        t.requires_grad_()
    torch.library.opcheck(torch.ops.einlinear.feed_forward.default, (x, *arguments))
    x, *tensors = [t.detach() for t in case.tensors]
    arguments = (case.grad, x, tensors, *arguments[1:])
    for needed in ([True] * len(case.tensors), [i % 2 == 0 for i in range(len(case.tensors))]):
        torch.library.opcheck(torch.ops.einlinear.feed_forward_backward.default, (*arguments, needed))


def test_operators_check_their_arguments() -> None:
    case = Case(layers("btt"))
    x, (tensors, specs, *others) = case.tensors[0], operator_arguments(case)
    operator = torch.ops.einlinear.feed_forward
    with pytest.raises(RuntimeError, match=r"shape \(48,\), not \(n, features\)"):
        operator(x[0], tensors, specs, *others)
    with pytest.raises(RuntimeError, match="up: factor B has shape"):
        operator(x, [tensors[0], tensors[0], *tensors[2:]], specs, *others)
    with pytest.raises(ValueError, match="unknown activation 'elu'"):
        operator(x, tensors, specs, *others[:2], "elu", False, "cpu")
    with pytest.raises(RuntimeError, match="'cpu' cannot run this"):
        operator(x.cfloat(), [t.cfloat() for t in tensors], specs, *others)


@pytest.mark.parametrize("gated", [False, True])
def test_flops_are_those_of_the_layers(gated: bool, fused: list[str]) -> None:
    case = Case(layers("btt", gated), tokens=20)
    macs = sum(s.macs for s in case.structures)
    for wanted, factor in (([], 3), ([True] + [False] * (len(case.tensors) - 1), 2)):
        with FlopCounterMode(display=False) as counter:
            case.run("cpu", torch.float64, wanted)
        assert counter.get_total_flops() == 2 * 20 * factor * macs
    # down alone: no gradient of hidden features, so its first factor has one product
    wanted = [False] * (len(case.tensors) - 3) + [True] * 3
    with FlopCounterMode(display=False) as counter:
        case.run("cpu", torch.float64, wanted)
    first, second = case.structures[-1].factors
    assert counter.get_total_flops() == 2 * 20 * (macs + first.macs + 2 * second.macs)
    assert fused == ["forward", "backward"] * 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_compile(fused: list[str]) -> None:
    torch._dynamo.reset()
    for gated in (False, True):
        case = Case(layers("btt", gated), residual=True)
        inputs = [t.clone().requires_grad_() for t in case.tensors]
        compiled = torch.compile(lambda *t, case=case: case.output(t, None), fullgraph=True, backend="aot_eager")
        expected = case.run("reference", torch.float64)
        fused.clear()
        y = compiled(*inputs)
        found = [y.detach(), *torch.autograd.grad(y, inputs, case.grad)]
        assert fused == ["forward", "backward"]
        assert max(errors(found, expected)) < 1e-12
        # another number of tokens, with symbolic shapes
        x = torch.randn(50, 48, dtype=torch.float64)
        torch.testing.assert_close(compiled(x, *inputs[1:]), case.output([x, *inputs[1:]], "reference"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_keeps_the_layers_apart_where_that_is_forced(fused: list[str]) -> None:
    torch._dynamo.reset()
    case = Case(layers("btt"))
    with el.backend("batched"):
        compiled = torch.compile(lambda *t: case.output(t, None), fullgraph=True, backend="aot_eager")
        compiled(*case.tensors)
    assert fused == []


def test_traced(fused: list[str]) -> None:
    case = Case(layers("btt", gated=True))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in case.tensors]
        assert case.output(fakes, None).shape == (40, 48)
        fakes[2] = fakes[2][:1]
        with pytest.raises(RuntimeError, match=r"up: factor B has shape \(1, "):
            case.output(fakes, None)
    recorded = make_fx(lambda *t: case.output(t, None))(*case.tensors)
    assert "einlinear.feed_forward" in recorded.code
    torch.testing.assert_close(recorded(*case.tensors), case.output(case.tensors, "reference"))
    assert fused


class Function(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.weights = case, nn.ParameterList(case.tensors[1:])

    def forward(self, x: Tensor) -> Tensor:
        return self.case.output([x, *self.weights], None)


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_exports_are_plain_operators(fused: list[str]) -> None:
    case = Case(layers("btt", gated=True), residual=True)
    model, longer = Function(case), torch.randn(70, 48, dtype=torch.float64)
    expected = case.output([longer, *case.tensors[1:]], "reference")
    shapes = ({0: torch.export.Dim("tokens", min=2, max=512)},)
    program = torch.export.export(model, (case.tensors[0],), dynamic_shapes=shapes)
    assert "einlinear" not in program.graph_module.code
    for traced in (
        program.module(),
        torch.jit.trace(model, (case.tensors[0],), check_trace=False),
        torch.fx.symbolic_trace(model),
    ):
        torch.testing.assert_close(traced(longer), expected)
    assert fused == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_transforms(fused: list[str]) -> None:
    case = Case(layers("btt", gated=True))
    x, *tensors = case.tensors

    def function(x: Tensor) -> Tensor:
        return case.output([x, *tensors], None)

    tangent, reference = torch.randn_like(x), case.output(case.tensors, "reference")
    y, change = torch.func.jvp(function, (x,), (tangent,))
    torch.testing.assert_close(y, reference)
    torch.testing.assert_close(torch.vmap(function)(x.unflatten(0, (2, 20))).flatten(0, 1), reference)
    assert fused == []
    (dx,) = torch.autograd.grad(function(x.requires_grad_()), x, case.grad)
    torch.testing.assert_close((dx * tangent).sum(), (change * case.grad).sum())
    torch.testing.assert_close(torch.func.vjp(function, x)[1](case.grad)[0], dx)
    assert fused == ["forward", "backward"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors(layout: torch.layout) -> None:
    case = Case(layers("btt"), residual=True)
    parts = [torch.randn(n, 48, dtype=torch.float64) for n in (30, 1, 25)]
    y = case.output([torch.nested.as_nested_tensor(parts, layout=layout), *case.tensors[1:]], None)
    assert y.layout is layout
    for a, b in zip(y.unbind(), parts, strict=True):
        torch.testing.assert_close(a, case.output([b, *case.tensors[1:]], "reference"))


@pytest.mark.parametrize("residual", [False, True])
def test_autocast(residual: bool, fused: list[str]) -> None:
    case = Case(layers("btt", sizes=(256, 512, 256)), residual=residual, dtype=torch.float32)
    tensors = [t.clone().requires_grad_() for t in case.tensors]
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = case.output(tensors, None), case.output(tensors, "reference")
    # torch adds float32 and bfloat16 in float32
    assert y.dtype == expected.dtype == (torch.float32 if residual else torch.bfloat16)
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
    grads = torch.autograd.grad(y.float().square().sum(), tensors)
    assert {grad.dtype for grad in grads} == {torch.float32}
    assert fused == ["forward", "backward"]
    with torch.autocast("cpu", torch.bfloat16):
        doubles = [t.double() for t in tensors]
        assert case.output(doubles, None).dtype == torch.float64


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool, fused: list[str]) -> None:
    case = Case(layers("btt"))
    expected = case.run("reference", torch.float64)
    tensors = [t.clone().requires_grad_() for t in case.tensors]
    y = checkpoint(lambda *t: case.output(t, None), *tensors, use_reentrant=use_reentrant)
    y.backward(case.grad)
    assert max(errors([y.detach(), *(t.grad for t in tensors)], expected)) < 1e-12  # type: ignore[misc]
    assert fused == ["forward", "forward", "backward"]


def test_inference_mode() -> None:
    case = Case(layers("btt"))
    with torch.inference_mode():
        y = case.output(case.tensors, None)
    torch.testing.assert_close(y, case.output(case.tensors, "reference"))


def reason(**changes: Any) -> str | None:
    arguments = {"tokens": 100, "dtype": torch.float32, "device": torch.device("cpu"), **changes}
    return ops.reason_not_to_fuse(**{"structures": layers("btt"), **arguments})


def test_reasons_not_to_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason() is None
    assert reason(tokens=15) == "fewer than 16 tokens are faster layer by layer"
    assert reason(tokens=16) is reason(tokens=15, backend="cpu") is None
    large = layers("dense", sizes=(1024, 1024, 1024))
    assert reason(structures=large) is None
    few = "training with 2,097,152 entries of factors needs 1,024 tokens to pay"
    assert reason(structures=large, training=True, tokens=1023) == few
    assert reason(structures=large, training=True, tokens=1024) == (
        "a hidden feature costs 1,024 multiply-accumulates, and its backward pass would compute it again, "
        "which pays up to 384"
    )
    assert reason(structures=large, training=True, backend="cpu") is None
    assert reason(structures=layers("btt(rank=4)", sizes=(2048, 8192, 2048)), training=True, tokens=1024) is None
    huge = layers("dense", sizes=(2048, 4096, 2048))
    assert str(reason(structures=huge)).endswith("but no more than 8,388,608 stay in cache together")
    assert reason(backend="batched") == "the backend 'batched' is forced, which has no fused blocks"
    kernel = "the backend 'cpu', which fuses blocks, cannot run: "
    assert reason(device=torch.device("meta")) == f"{kernel}it runs on the CPU, not on meta"
    assert str(reason(dtype=torch.complex64)).startswith(f"{kernel}it computes in real numbers")
    with el.backend("reference"):
        assert reason() == "the backend 'reference' is forced, which has no fused blocks"
        assert reason(backend="cpu") is None
    with el.backend("cpu"):
        assert reason(tokens=1) is None
    with el.backend(recompute=False):
        assert reason() is None
        assert "einlinear.backend(recompute=False) saves them" in str(reason(training=True))
    monkeypatch.setattr(fused_dispatch, "reason_unsupported", lambda *_: "no compiler")
    assert reason() == f"{kernel}no compiler"


@pytest.mark.parametrize(("tokens", "backend"), [(15, None), (100, "batched"), (100, "reference")])
def test_refused_blocks_run_layer_by_layer(tokens: int, backend: str | None, fused: list[str]) -> None:
    case = Case(layers("btt", gated=True), tokens=tokens, residual=True)
    found = case.run(backend, torch.float64)
    assert fused == []
    assert max(errors(found, case.run("cpu", torch.float64))) < 1e-12


def test_backends_that_cannot_run_are_refused() -> None:
    case = Case(layers("btt"))
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        case.output(case.tensors, "fast")
    with pytest.raises(RuntimeError, match="'triton' cannot run this"):
        case.output(case.tensors, "triton")


def released(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


WRONG: dict[str, tuple[int, Callable[[Tensor], Any], type[Exception], str]] = {
    "x of float32": (0, lambda t: t.float(), RuntimeError, "up: the input is of torch.float32, but the layer of"),
    "x released": (0, released, RuntimeError, "up: the memory of the input is smaller"),
    "a factor of up": (2, lambda t: t[:1], RuntimeError, r"up: factor B has shape \(1, .* but btt, 48 -> 96 needs"),
    "a bias of up": (3, lambda t: t[:7], RuntimeError, r"up: the bias has shape \(7,\), .* \(out_features=96\)"),
    "a factor of gate": (4, lambda t: t.float(), RuntimeError, r"gate: factor .* of torch.float"),
    "a bias of gate": (6, lambda t: t.to("meta"), RuntimeError, "gate: the bias is on meta"),
    "a factor of down": (8, released, RuntimeError, "down: the memory of factor B is smaller"),
    "all factors of down": (-1, lambda t: t.float(), RuntimeError, "down: the bias is of torch.float32"),
    "no tensor": (8, lambda t: None, TypeError, "down: factor B must be a tensor, not NoneType"),
}


@pytest.mark.parametrize("backend", ["cpu", None, "reference"])
@pytest.mark.parametrize("wrong", WRONG)
def test_tensors_that_do_not_fit(wrong: str, backend: str | None) -> None:
    index, replace, error, message = WRONG[wrong]
    case = Case(layers("btt", gated=True))
    case.tensors[index] = replace(case.tensors[index])
    with pytest.raises(error, match=message):
        case.output(case.tensors, backend)


def test_layers_of_another_dtype() -> None:
    """As a whole, so that each fits in itself."""
    case = Case(layers("btt"))
    case.tensors[4:] = [t.float() for t in case.tensors[4:]]
    with pytest.raises(RuntimeError, match=r"down: the input is of torch.float64, but the layer of torch.float32"):
        case.output(case.tensors, "cpu")


def test_gradients_that_do_not_fit() -> None:
    case = Case(layers("btt"))
    leaves = [t.requires_grad_() for t in case.tensors]
    y = case.output(leaves, "cpu")
    leaves[1].data.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="up: the memory of factor A is smaller"):
        y.backward(case.grad)
    block = feed_forward_structure.FeedForwardStructure(tuple(case.structures), (True, True), "gelu", False)
    with pytest.raises(RuntimeError, match=r"down: the gradient of the output has shape \(40, 47\)"):
        block.check(*[t.detach() for t in case.tensors[:1]], case.tensors[1:], case.grad[:, 1:], memory=False)


def test_layers_that_do_not_fit() -> None:
    def weights(in_features: int, out_features: int) -> ops.Weights:
        structure = el.structure("low_rank(rank=2)", in_features, out_features)
        return ops.Weights(structure, [torch.randn(shape) for shape in structure.shapes])

    x, up, down = torch.randn(20, 8), weights(8, 12), weights(12, 8)
    with pytest.raises(ValueError, match="down reads 8 hidden features, but up writes 12"):
        ops.feed_forward(x, up, up)
    with pytest.raises(ValueError, match="gate is of 12 -> 8 features, but must be of 8 -> 12 as up is"):
        ops.feed_forward(x, up, down, down)
    with pytest.raises(ValueError, match="down writes 9 features, but the input has 8: with residual=True both"):
        ops.feed_forward(x, up, weights(12, 9), residual=True)
    with pytest.raises(ValueError, match=r"unknown activation 'elu': choose identity, relu, .* or tanh"):
        ops.feed_forward(x, up, down, activation="elu")
    with pytest.raises(ValueError, match=r"down: low_rank.* has 2 factors, not 1"):
        ops.feed_forward(x, up, down._replace(factors=down.factors[:1]))
    with pytest.raises(TypeError, match=r"up must be Weights\(structure, factors, bias\), not Linear"):
        ops.feed_forward(x, el.Linear(8, 12, "dense"), down)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="its last dimension must be in_features=8"):
        ops.feed_forward(x[:, 1:], up, down)
    with pytest.raises(TypeError, match="the input must be a tensor, not list"):
        ops.feed_forward(x.tolist(), up, down)


def test_names_of_activations() -> None:
    functions = {
        "gelu": [F.gelu, nn.GELU()],
        "gelu_tanh": [nn.GELU("tanh")],
        "relu": [F.relu, torch.relu, nn.ReLU(), nn.ReLU(inplace=True)],
        "silu": [F.silu, nn.SiLU()],
        "sigmoid": [torch.sigmoid, F.sigmoid, nn.Sigmoid()],
        "tanh": [torch.tanh, F.tanh, nn.Tanh()],
        "identity": [nn.Identity()],
    }
    for name, activations in functions.items():
        for activation in activations:
            assert name_of(activation) == name
            x = torch.randn(10)
            torch.testing.assert_close(ops.ACTIVATIONS[name](x), activation(x.clone()))

    class Mine(nn.ReLU):
        """May compute something else."""

    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, x: Tensor) -> Tensor:
            return x

    assert {name_of(f) for f in (Mine(), nn.ELU(), F.elu, lambda x: x, Unhashable())} == {None}
