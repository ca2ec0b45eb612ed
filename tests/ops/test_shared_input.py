"""Several layers of one input: the numbers of separate calls, and which layers run as one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tests.families import SAMPLES, structures
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import einlinear as el
from einlinear import ops
from einlinear.ops import shared_input
from einlinear.structures import Structure

SPECS = [spec for specs in SAMPLES.values() for spec in specs]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The output features of the products that ran."""
    why = ops.reason_unsupported("cpu", el.structure("btt", 16, 16), torch.float32, "cpu")
    if why is not None:
        pytest.skip(why)  # where CI=true, test_cpu.py fails
    found: list[int] = []
    linear = shared_input.linear

    def watched(structure: Structure, *arguments: Any) -> Tensor:
        found.append(structure.out_features)
        return linear(structure, *arguments)

    monkeypatch.setattr(shared_input, "linear", watched)
    return found


def draw(
    structures: Sequence[Structure], bias: Sequence[bool], dtype: torch.dtype = torch.float64
) -> list[ops.Weights]:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    pairs = zip(structures, bias, strict=True)
    return [ops.Weights(s, [leaf(*f.shape) for f in s.factors], leaf(s.out_features) if b else None) for s, b in pairs]


def alike(count: int = 3, features: int = 64, dtype: torch.dtype = torch.float64) -> list[ops.Weights]:
    return draw([el.structure("btt", features, features)] * count, [True] * count, dtype)


def one_by_one(x: Tensor, layers: Sequence[ops.Weights]) -> tuple[Tensor, ...]:
    return tuple(ops.linear(structure, factors, x, bias) for structure, factors, bias in layers)


def tensors(layers: Sequence[ops.Weights]) -> list[Tensor]:
    return [t for _, factors, bias in layers for t in (*factors, bias) if t is not None]


def compare(x: Tensor, layers: Sequence[ops.Weights], leaves: Sequence[Tensor], dtype: torch.dtype) -> None:
    found, expected = ops.shared_input_linear(x, layers), one_by_one(x, layers)
    assert [y.shape for y in found] == [y.shape for y in expected]
    if leaves:
        grads = [torch.randn_like(y) for y in expected]
        found += torch.autograd.grad(found, leaves, grads)
        expected += torch.autograd.grad(expected, leaves, grads)
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - exact.double()).norm() <= TOLERANCES[dtype] * exact.double().norm()


# Numbers


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("spec", SPECS)
def test_numbers_are_those_of_separate_calls(spec: str, dtype: torch.dtype, widths: list[int]) -> None:
    structure = structures(spec, [(36, 36), (36, 48)])[-1]
    for bias in (True, False):
        layers = draw([structure] * 3, [bias] * 3, dtype)
        for shape in ((100,), (20, 9)):
            x = torch.randn(*shape, 36, dtype=dtype, requires_grad=True)
            widths.clear()
            with torch.no_grad():
                compare(x, layers, [], dtype)
            compare(x, layers, [x, *tensors(layers)], dtype)
            if structure.params < 1000:
                assert widths == [3 * structure.out_features] * 2


def test_unequal_layers_run_in_groups_of_equal_ones(widths: list[int]) -> None:
    wide, narrow, other = el.structure("btt", 64, 64), el.structure("btt", 64, 16), el.structure("low_rank", 64, 64)
    x = torch.randn(300, 64, dtype=torch.float64, requires_grad=True)
    for kinds, bias, expected in (
        ((wide, narrow, narrow), (True, True, True), [32, 64]),
        ((wide, narrow, wide, narrow), (True, True, True, True), [128, 32]),
        ((wide, other, wide), (False, False, False), [128, 64]),
        # a stack has biases or none
        ((wide, wide, wide), (True, False, True), [128, 64]),
        ((wide, narrow), (True, True), [64, 16]),
        ((wide,), (True,), [64]),
        ((), (), []),
    ):
        layers = draw(kinds, bias)
        widths.clear()
        ops.shared_input_linear(x, layers)
        assert widths == expected
        if layers:
            compare(x, layers, [x, *tensors(layers)], torch.float64)


def test_gradients_of_gradients(widths: list[int]) -> None:
    layers = draw([el.structure("btt", 4, 4)] * 2, [True, True])
    x = torch.randn(40, 4, dtype=torch.float64, requires_grad=True)

    def compute(x: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        values = iter(given)
        replaced = [ops.Weights(s, [next(values) for _ in factors], next(values)) for s, factors, _ in layers]
        return ops.shared_input_linear(x, replaced)

    inputs = (x, *tensors(layers))
    assert gradcheck(compute, inputs, fast_mode=True)
    assert gradgradcheck(compute, inputs, fast_mode=True)
    assert {*widths} == {8}


def test_an_output_that_is_not_used(widths: list[int]) -> None:
    layers, x = alike(), torch.randn(100, 64, dtype=torch.float64)
    ops.shared_input_linear(x, layers)[1].sum().backward()
    expected = torch.autograd.grad(one_by_one(x, layers)[1].sum(), tensors(layers[1:2]))
    torch.testing.assert_close([t.grad for t in tensors(layers[1:2])], [*expected])
    assert not any(t.grad.any() for t in tensors([layers[0], layers[2]]) if t.grad is not None)
    assert widths == [192]


def test_outputs_can_be_changed_in_place(widths: list[int]) -> None:
    """As those of separate calls: without an effect on one another."""
    layers, x = alike(), torch.randn(100, 64, dtype=torch.float64, requires_grad=True)
    query, key, value = ops.shared_input_linear(x, layers)
    first, second, third = one_by_one(x, layers)
    query.mul_(key)
    (query * value).sum().backward()
    expected = torch.autograd.grad((first * second * third).sum(), x)
    torch.testing.assert_close((query, key, value, x.grad), (first * second, second, third, *expected))
    with torch.no_grad():
        query, key, _ = ops.shared_input_linear(x, layers)
    query.mul_(x)
    torch.testing.assert_close((query, key), (first * x, second))
    assert widths == [192, 192]


def test_under_activation_checkpointing(widths: list[int]) -> None:
    layers, x = alike(), torch.randn(100, 64, dtype=torch.float64, requires_grad=True)
    leaves, found = [x, *tensors(layers)], []
    for reentrant in (False, True):
        ys = checkpoint(ops.shared_input_linear, x, layers, use_reentrant=reentrant)
        torch.stack(ys).square().sum().backward()
        found.append([t.grad for t in leaves])
        for t in leaves:
            t.grad = None
    expected = torch.autograd.grad(torch.stack(one_by_one(x, layers)).square().sum(), leaves)
    torch.testing.assert_close(found, [[*expected], [*expected]])
    assert widths == [192] * 4


# Which layers run as one product


def test_the_rule() -> None:
    """Stacking copies all entries, and saves reads of the input."""
    wide, cpu = el.structure("btt", 1024, 1024), torch.device("cpu")

    def why(structure: Structure, tokens: int, layers: int = 3, device: torch.device = cpu) -> str | None:
        return ops.reason_not_to_stack(structure, layers, tokens, torch.float32, device)

    assert why(wide, 2048) is None
    # three times 2 * 32^3 entries are twice the features of 96 tokens, which are read by two more layers
    assert why(wide, 192) is None
    few = why(wide, 191)
    assert few == "to copy 196,608 entries takes longer than to read 391,168 features of the input again"
    assert why(wide, 192, layers=2) is not None
    large = why(el.structure("low_rank(rank=128)", 1024, 1024), 10**6)
    assert large == "together their factors have 786,432 entries, but no more than 524,288 stay in cache"
    medium = el.structure("btt(rank=2)", 1024, 1024)
    assert ops.reason_not_to_stack(medium, 3, 2048, torch.float32, cpu) is None
    training = ops.reason_not_to_stack(medium, 3, 2048, torch.float32, cpu, True)
    assert training == "together their factors have 393,216 entries, but no more than 262,144 stay in cache"
    assert "padded outputs" in str(why(el.structure("btt", 64, 47), 2048))
    assert "'batched'" in str(why(wide, 2048, device=torch.device("meta")))
    with el.backend("reference"):
        assert "'reference' is forced" in str(why(wide, 2048))
    with el.backend("cpu"):
        assert why(wide, 2048) is None


def test_few_tokens_run_one_layer_after_the_other(widths: list[int]) -> None:
    layers = alike()
    for tokens, expected in ((1, [64] * 3), (0, [64] * 3), (1000, [192])):
        widths.clear()
        x = torch.randn(tokens, 64, dtype=torch.float64)
        torch.testing.assert_close(ops.shared_input_linear(x, layers), one_by_one(x, layers))
        assert widths == expected


def test_partly_frozen_layers_run_one_after_the_other(widths: list[int]) -> None:
    layers, x = alike(), torch.randn(100, 64, dtype=torch.float64)
    layers[1].factors[0].requires_grad_(False)
    ys = ops.shared_input_linear(x, layers)
    torch.autograd.grad(torch.stack(ys).sum(), [layers[1].factors[1], *layers[0].factors])
    assert widths == [64] * 3
    widths.clear()
    with torch.no_grad():
        ops.shared_input_linear(x, layers)
    for t in tensors(layers):
        t.requires_grad_(False)
    assert not any(y.requires_grad for y in ops.shared_input_linear(x, layers))
    compare(x.requires_grad_(), layers, [x], torch.float64)
    assert widths == [192] * 3


def test_frozen_layers_run_as_in_inference(widths: list[int]) -> None:
    """Together too large to be trained as one product."""
    wide, x = el.structure("btt(rank=2)", 1024, 1024), torch.randn(1024, 1024)
    layers = draw([wide] * 3, [True] * 3, torch.float32)
    ops.shared_input_linear(x, layers)
    assert widths == [1024] * 3
    widths.clear()
    for t in tensors(layers):
        t.requires_grad_(False)
    ops.shared_input_linear(x, layers)
    assert widths == [3072]


class Marked(Tensor):
    """A tensor of another kind."""


def autocast(call: Callable[[], Any]) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return call()


def count_flops(call: Callable[[], Any]) -> Any:
    with FlopCounterMode(display=False):
        return call()


def forward_mode(call: Callable[[], Any]) -> Any:
    with forward_ad.dual_level():
        return call()


@pytest.mark.parametrize("around", [autocast, count_flops, forward_mode])
def test_observed_calls_are_separate(around: Callable[..., Any], widths: list[int]) -> None:
    layers, x = alike(dtype=torch.float32), torch.randn(300, 64)
    found = around(lambda: ops.shared_input_linear(x, layers))
    assert widths == [64] * 3
    torch.testing.assert_close(found, around(lambda: one_by_one(x, layers)))


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(el.Linear(64, 64, "btt") for _ in range(3))

    def weights(self) -> list[ops.Weights]:
        return [ops.Weights(layer.structure, layer.factors(), layer.bias) for layer in self.layers]  # type: ignore[union-attr,operator,arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(ops.shared_input_linear(x, self.weights()))


@pytest.mark.parametrize("kind", ["vmap", "make_fx", "export", "subclass", "nested"])
def test_transforms_and_other_tensors_get_separate_calls(kind: str, widths: list[int]) -> None:
    model, x = Projections(), torch.randn(300, 64)
    expected = torch.stack(one_by_one(x, model.weights()))
    if kind == "vmap":
        found = torch.func.vmap(model, in_dims=1, out_dims=1)(x[:, None])[:, 0]
    elif kind == "make_fx":
        found = make_fx(model)(x)(x)
    elif kind == "export":
        found = torch.export.export(model, (x,)).module()(x)
    elif kind == "subclass":
        found = model(x.as_subclass(Marked)).as_subclass(Tensor)
    else:
        halves = torch.nested.nested_tensor([x[:100], x[100:]], layout=torch.jagged)
        found = torch.stack([y.values() for y in ops.shared_input_linear(halves, model.weights())])
    torch.testing.assert_close(found, expected)
    # export runs the layers in a copy of the module
    assert {*widths} <= {64}
    assert widths or kind == "export"


def test_torch_compile_traces_separate_calls() -> None:
    model, x = Projections(), torch.randn(300, 64)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


def test_fake_and_meta_tensors() -> None:
    with FakeTensorMode():
        assert Projections()(torch.randn(300, 64)).shape == (3, 300, 64)
    assert Projections().to("meta")(torch.randn(300, 64, device="meta")).shape == (3, 300, 64)


def test_what_does_not_fit_raises_as_a_separate_call_does(widths: list[int]) -> None:
    x, structure = torch.randn(300, 64), el.structure("btt", 64, 64)
    good = alike(dtype=torch.float32)
    a, b = good[1].factors
    released = a.detach().clone()
    released.untyped_storage().resize_(0)
    for layer, message in (
        (ops.Weights(structure, [a.double(), b.double()], good[1].bias), "the input is of torch.float32"),
        (ops.Weights(structure, [a[1:], b], good[1].bias), r"factor A has shape \(7, 1, 8, 8\)"),
        (ops.Weights(structure, [released, b], good[1].bias), "the memory of factor A is smaller"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.shared_input_linear(x, [good[0], layer, good[2]])
    with pytest.raises(ValueError, match="has 2 factors, not 1"):
        ops.shared_input_linear(x, [good[0], ops.Weights(structure, [a], good[1].bias), good[2]])
    with pytest.raises(RuntimeError, match="its last dimension must be in_features=64"):
        ops.shared_input_linear(x[:, 1:], good)
    with pytest.raises(TypeError, match="a layer must be Weights"):
        ops.shared_input_linear(x, [good[0], nn.Linear(64, 64)])  # type: ignore[list-item]
    assert 192 not in widths
