"""bfloat16 and float16 in the compiled CPU kernel: as exact as `torch.nn.Linear` in the same dtype."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import einlinear as el
from einlinear import ops

HALVES = [torch.bfloat16, torch.float16]
SPECS = ["dense", "low_rank(rank=32)", "kronecker", "tt(rank=4)", "btt", "btt(rank=2)", "btt(cores=3)", "monarch"]
SPECS += ["dyad", "block_diagonal", "blast(blocks=4, rank=8)"]
IN, OUT = 256, 320
pytestmark = pytest.mark.skipif(
    ops.reason_unsupported("cpu", el.structure("btt", IN, OUT), torch.bfloat16, "cpu") is not None,
    reason="no compiled kernel",
)


def results(layer: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The output, the gradient of x, and those of the weights and the bias."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], grad)]


def errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Relative errors, of the output and of every gradient."""
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


def doubled(layer: nn.Module, like: nn.Module) -> nn.Module:
    like.load_state_dict(layer.state_dict())
    return like


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("recompute", [True, False])
def test_errors_are_those_of_a_dense_layer(spec: str, dtype: torch.dtype, recompute: bool) -> None:
    torch.manual_seed(0)
    layer = el.Linear(IN, OUT, spec, dtype=dtype)
    exact_layer = doubled(layer, el.Linear(IN, OUT, spec, dtype=torch.float64))
    dense = nn.Linear(IN, OUT, dtype=dtype)
    exact_dense = doubled(dense, nn.Linear(IN, OUT, dtype=torch.float64))
    for tokens in (1, 5, 40, 300):
        x, grad = torch.randn(tokens, IN, dtype=dtype), torch.randn(tokens, OUT, dtype=dtype)
        with el.backend("cpu", recompute=recompute):
            found = results(layer, x, grad)
            with torch.no_grad():
                decoded = layer(x)
        of_dense = errors(results(dense, x, grad), results(exact_dense, x.double(), grad.double()))
        exact = results(exact_layer, x.double(), grad.double())
        assert {tensor.dtype for tensor in found} == {dtype}
        y, dx, *weights = errors(found, exact)
        assert y <= 1.5 * of_dense[0]
        assert errors([decoded], exact[:1])[0] <= 1.5 * of_dense[0]
        assert dx <= 1.5 * of_dense[1]
        # the bias's gradient is torch's own sum
        assert max(weights[:-1]) <= 1.5 * of_dense[2]


@pytest.mark.parametrize("dtype", HALVES)
def test_errors_of_mixtures_are_those_of_a_dense_layer(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    s, tokens, experts, active = el.structure("btt(rank=2)", IN, OUT), 200, 4, 2
    factors = [torch.randn(experts, *f.shape, dtype=dtype) / f.fan_in**0.5 for f in s.factors]
    x, gates = torch.randn(tokens, IN, dtype=dtype), torch.rand(tokens, active, dtype=dtype)
    indices = torch.rand(tokens, experts).argsort(1)[:, :active]
    grad = torch.randn(tokens, OUT, dtype=dtype)

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        tensors = [t.to(dtype).requires_grad_() for t in (x, gates, *factors)]
        routing = ops.Routing(indices, tensors[1])
        y = ops.linear(s, tensors[2:], tensors[0], backend=backend, routing=routing)
        return [y.detach(), *torch.autograd.grad(y, tensors, grad.to(dtype))]

    dense = nn.Linear(IN, OUT, dtype=dtype)
    exact_dense = doubled(dense, nn.Linear(IN, OUT, dtype=torch.float64))
    of_dense = max(errors(results(dense, x, grad), results(exact_dense, x.double(), grad.double()))[:3])
    assert max(errors(run(dtype, "cpu"), run(torch.float64, "batched"))) <= 1.5 * of_dense


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), 1e-7, -6e-8, 65519.0, 0.0])
def test_special_numbers_are_those_of_torch(dtype: torch.dtype, special: float) -> None:
    """NaN, infinities, numbers below the normal ones and the largest one pass as torch passes them."""
    layer = el.Linear(64, 64, "block_diagonal(blocks=64)", bias=False, dtype=dtype)
    (factor,) = layer.parameters()
    with torch.no_grad():
        factor.fill_(1)
    x = torch.randn(40, 64).to(dtype)
    x[3, 5], x[39, 63] = special, special
    for tokens in (1, 4, 40):
        with el.backend("cpu"):
            torch.testing.assert_close(layer(x[-tokens:]), x[-tokens:], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALVES)
def test_ties_round_to_even(dtype: torch.dtype) -> None:
    """As torch rounds, also below the normal numbers; checked on sums that lie between two numbers."""
    layer = el.Linear(2, 1, "dense", bias=False, dtype=dtype)
    with torch.no_grad():
        next(layer.parameters()).fill_(1)
    large = torch.arange(-300, 300).repeat(64, 1).T.reshape(-1).to(dtype) * 2.0**-14
    small = torch.randint(-64, 64, large.shape).to(dtype) * 2.0**-24
    x = torch.stack([large, small], 1)
    expected = (large.double() + small.double()).to(dtype)[:, None]
    for start, tokens in ((0, len(x)), (100, 3), (777, 1)):
        with el.backend("cpu"):
            torch.testing.assert_close(
                layer(x[start : start + tokens]), expected[start : start + tokens], rtol=0, atol=0
            )


def test_autocast_runs_the_compiled_kernel() -> None:
    layer, x = el.Linear(IN, OUT, "btt"), torch.randn(40, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert el.explain(layer, x).backend == "cpu"
        y = layer(x)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])
    assert {grad.dtype for grad in grads} == {torch.float32}
