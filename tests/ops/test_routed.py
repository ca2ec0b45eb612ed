"""Products with chosen matrices: token by token those of a plain loop, on every backend of the CPU, for any load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import einlinear as el
from einlinear import ops
from einlinear.ops import backends
from einlinear.ops.backends import CPU_BACKENDS
from einlinear.structures import Structure

SPECS = ["btt", "btt(rank=2)", "low_rank(rank=4)", "monarch(blocks=4)", "dense", "dyad", "tt(rank=2, cores=3)"]
LOADS: dict[str, Callable[[int, int, int], Tensor]] = {
    "random": lambda n, count, active: torch.rand(n, count).topk(active).indices,
    "even": lambda n, count, active: torch.arange(n * active).view(n, active) % count,
    "the same experts": lambda n, count, active: torch.arange(active).expand(n, active),
    "one is empty": lambda n, count, active: 1 + torch.rand(n, count - 1).topk(active).indices,
}


@pytest.fixture(params=CPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if ops.reason_unsupported(request.param, el.structure("dense", 2, 2), torch.float64, "cpu") is not None:
        pytest.skip("the compiled kernel is not available")  # where CI=true, test_cpu.py fails
    with el.backend(request.param):
        yield request.param


def drawn(
    spec: str, count: int, load: str, n: int, active: int, features: tuple[int, int] = (30, 42)
) -> tuple[Structure, list[Tensor], Tensor, list[Tensor]]:
    """A structure, stacked factors, the experts of every token, and x, gates and bias."""
    torch.manual_seed(0)
    structure = el.structure(spec, *features)  # btt and the like pad these
    factors = [torch.randn(count, *factor.shape).double().requires_grad_() for factor in structure.factors]
    others = [torch.randn(shape).double().requires_grad_() for shape in ((n, features[0]), (n, active), features[1:])]
    return structure, factors, LOADS[load](n, count, active), others


def routed(
    structure: Structure,
    factors: Sequence[Tensor],
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    return ops.linear(structure, factors, x, bias, routing=ops.Routing(indices, gates))


def token_by_token(
    structure: Structure, factors: list[Tensor], x: Tensor, experts: Tensor, gates: Tensor, bias: Tensor
) -> Tensor:
    rows = []
    for token, chosen, weights in zip(x, experts.tolist(), gates, strict=True):
        row = bias
        for e, weight in zip(chosen, weights, strict=True):
            row = row + weight * (ops.dense_weight(structure, [factor[e] for factor in factors]) @ token)
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("spec", SPECS)
def test_outputs_and_gradients_of_a_loop_over_tokens(spec: str, load: str, backend: str) -> None:
    structure, factors, experts, (x, gates, bias) = drawn(spec, 5, load, 90, 3)
    expected = token_by_token(structure, factors, x, experts, gates, bias)
    grad = torch.randn_like(expected)
    inputs = [x, gates, bias, *factors]
    wanted = torch.autograd.grad(expected, inputs, grad)
    y = routed(structure, factors, x, experts, gates, bias)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(routed(structure, factors, x, experts, gates, bias), y)
    for a, b in zip(torch.autograd.grad(y, inputs, grad), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(("threads", "n", "count"), [(1, 7, 4), (2, 3000, 4), (3, 2500, 70), (4, 3, 4)])
def test_threads_and_blocks(threads: int, n: int, count: int, load: str, backend: str) -> None:
    structure, factors, experts, (x, gates, bias) = drawn("btt(rank=2)", count, load, n, 2)
    inputs = [x, gates, bias, *factors]
    with el.backend("reference"):
        expected = routed(structure, factors, x, experts, gates, bias)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, inputs, grad)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = routed(structure, factors, x, experts, gates, bias)
        found = torch.autograd.grad(y, inputs, grad)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_every_subset_of_gradients(backend: str) -> None:
    structure, factors, experts, others = drawn("btt", 5, "random", 60, 2)
    inputs = [*others, *factors]
    x, gates, bias = others
    grad = torch.randn(60, 42).double()
    wanted = torch.autograd.grad(routed(structure, factors, x, experts, gates, bias), inputs, grad)
    for mask in range(1, 2 ** len(inputs)):
        for i, tensor in enumerate(inputs):
            tensor.grad = None
            tensor.requires_grad_(bool(mask >> i & 1))
        routed(structure, factors, x, experts, gates, bias).backward(grad)
        for i, tensor in enumerate(inputs):
            if mask >> i & 1:
                torch.testing.assert_close(tensor.grad, wanted[i])
            else:
                assert tensor.grad is None


def test_gradients_of_gradients(backend: str) -> None:
    structure, factors, experts, others = drawn("btt", 3, "random", 4, 2, (6, 8))

    def run(x: Tensor, gates: Tensor, bias: Tensor, *factors: Tensor) -> Tensor:
        return routed(structure, factors, x, experts, gates, bias)

    assert torch.autograd.gradcheck(run, (*others, *factors))
    assert torch.autograd.gradgradcheck(run, (*others, *factors))


def test_no_tokens(backend: str) -> None:
    structure, factors, experts, (x, gates, bias) = drawn("btt", 3, "random", 5, 2)
    y = routed(structure, factors, x[:0], experts[:0], gates[:0], bias)
    assert y.shape == (0, 42)
    y.sum().backward()
    for factor in factors:
        assert factor.grad is not None
        assert not factor.grad.any()


def test_a_token_does_not_depend_on_the_others(backend: str) -> None:
    structure, factors, experts, (x, gates, _) = drawn("btt", 5, "random", 300, 2)
    with torch.no_grad():
        whole = routed(structure, factors, x, experts, gates)
        some = torch.randperm(300)[:40]
        part = routed(structure, factors, x[some], experts[some], gates[some])
        changed = routed(structure, factors, x.clone().index_fill_(0, some[:1], torch.nan), experts, gates)
    torch.testing.assert_close(part, whole[some], rtol=0, atol=1e-12)
    assert changed[some[0]].isnan().all()
    assert changed.isnan().any(1).sum() == 1


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_in_float32(spec: str, backend: str) -> None:
    structure, factors, experts, others = drawn(spec, 5, "random", 300, 2)
    grad = torch.randn(300, 42).double()

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        x, gates, bias, *own = inputs = [t.detach().to(dtype).requires_grad_() for t in (*others, *factors)]
        return [*torch.autograd.grad(routed(structure, own, x, experts, gates, bias), inputs, grad.to(dtype))]

    for a, b in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-5 * float(b.abs().max()))


def test_strides(backend: str) -> None:
    structure, factors, experts, (x, gates, bias) = drawn("btt", 5, "random", 50, 2)
    strided = [t.detach().T.contiguous().T.requires_grad_() for t in (x, gates)]
    y = routed(structure, factors, x, experts, gates, bias)
    other = routed(structure, factors, strided[0], experts.T.contiguous().T, strided[1], bias)
    torch.testing.assert_close(other, y)
    grad = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(other, strided, grad), torch.autograd.grad(y, [x, gates], grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    structure, factors, experts, others = drawn("btt", 5, "random", 50, 2)
    x, gates, bias = (tensor.detach() for tensor in others)
    expected = routed(structure, factors, x, experts, gates, bias)
    factors = [factor.detach().to(dtype) for factor in factors]
    y = routed(structure, factors, x.to(dtype), experts, gates.to(dtype), bias.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=(5 if dtype == torch.bfloat16 else 1e-4))
    with torch.autocast("cpu", torch.bfloat16):
        assert routed(structure, factors, x.float(), experts, gates).dtype == torch.bfloat16


def test_the_operator_is_one_of_torch() -> None:
    structure, factors, experts, others = drawn("btt", 5, "random", 20, 2)
    x, gates, bias = others
    arguments = (x, factors, bias, experts, gates, structure.spec, structure.out_features, "batched")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.einlinear.linear.default, arguments, test_utils=checks)

    def run(x: Tensor) -> Tensor:
        return routed(structure, factors, x, experts, gates, bias).square()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    inputs = [x, gates, bias, *factors]
    torch.testing.assert_close(compiled(x), run(x))
    grad = torch.randn(20, 42).double()
    wanted = torch.autograd.grad(run(x), inputs, grad)
    for a, b in zip(torch.autograd.grad(compiled(x), inputs, grad), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_backward_and_what_is_compiled_keep_their_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    structure, factors, experts, (x, gates, _) = drawn("btt", 5, "random", 20, 2)
    found = backends.find("batched")
    calls = []
    for name in ("forward", "backward"):
        own = getattr(found, name)
        monkeypatch.setattr(found, name, lambda *a, own=own, name=name: calls.append(name) or own(*a))

    def run(x: Tensor) -> Tensor:
        return routed(structure, factors, x, experts, gates)

    with el.backend("batched"):
        y = run(x)
    y.sum().backward()
    assert calls == ["forward", "backward"]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with el.backend("batched"):
        compiled(x)
    compiled(x).sum().backward()
    assert calls[2:] == ["forward", "forward", "backward"]


def test_functional_transforms_see_plain_operators() -> None:
    structure, factors, experts, (x, gates, _) = drawn("btt", 5, "random", 6, 2)

    def one(token: Tensor) -> Tensor:
        return routed(structure, factors, token[None], experts[:1], gates[:1])[0]

    expected = routed(structure, factors, x, experts[:1].expand(6, 2), gates[:1].expand(6, 2))
    torch.testing.assert_close(torch.vmap(one)(x), expected)


@pytest.mark.parametrize("backend", ["batched", "cpu"], indirect=True)
def test_experts_that_there_are_not(backend: str) -> None:
    structure, factors, experts, (x, gates, _) = drawn("btt", 5, "random", 60, 2)
    for bad in (-1, 5):
        with pytest.raises(IndexError, match=f"expert {bad}: there are 5"):
            routed(structure, factors, x, experts.index_fill(0, torch.tensor([30]), bad), gates)


def test_flops_and_fake_tensors() -> None:
    structure, factors, experts, (x, gates, bias) = drawn("btt", 5, "random", 60, 2)
    with FlopCounterMode(display=False) as counter:
        routed(structure, factors, x, experts, gates, bias).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 120 * structure.macs
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(t) for t in (x, experts, gates)]
        assert routed(structure, [mode.from_tensor(f) for f in factors], *fake).shape == (60, 42)


def test_wrong_inputs() -> None:
    structure, factors, experts, (x, gates, _) = drawn("btt", 5, "random", 6, 2)
    with pytest.raises(RuntimeError, match="in_features=30"):
        routed(structure, factors, x[:, 1:], experts, gates)
    with pytest.raises(RuntimeError, match=r"float32.*float64"):
        routed(structure, factors, x.float(), experts, gates)
    for wrong in ((experts, gates[:, :1]), (experts[:5], gates[:5]), (experts[:, :0], gates[:, :0])):
        with pytest.raises(RuntimeError, match=r"both must be \(6, active\)"):
            routed(structure, factors, x, *wrong)
    with pytest.raises(RuntimeError, match=r"indices are of torch\.int32"):
        routed(structure, factors, x, experts.int(), gates)
    with pytest.raises(RuntimeError, match="out_features=42"):
        routed(structure, factors, x, experts, gates, torch.zeros(1).double())
