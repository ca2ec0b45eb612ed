"""What all backends of the CPU owe: the dense matrix's numbers, for any input, and nothing but what is asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import einlinear as el
from einlinear import ops
from einlinear.ops.backends import CPU_BACKENDS

CPU = torch.device("cpu")
SPECS = ["btt(rank=2)", "kronecker", "monarch", "low_rank(rank=5)", "dyad", "btt(cores=3)", "blast(blocks=4, rank=3)"]


@pytest.fixture(autouse=True, params=CPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    why = ops.reason_unsupported(request.param, el.structure("dense", 2, 2), torch.float64, CPU)
    if why is not None:  # where CI=true, test_cpu.py fails
        pytest.skip(why)
    with el.backend(request.param):
        yield request.param


def layer_and_gradients(
    spec: str, shape: tuple[int, ...] = (37, 48), out_features: int = 80
) -> tuple[el.Linear, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    layer = el.Linear(shape[-1], out_features, spec, dtype=torch.float64)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    return layer, x, [x, *layer.parameters()]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("tokens", [1, 7, 17, 333])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("features", [(48, 80), (47, 91), (62, 33)])  # the latter two are padded
def test_agrees_with_the_dense_matrix(
    spec: str, tokens: int, recompute: bool, features: tuple[int, int], backend: str
) -> None:
    layer, x, inputs = layer_and_gradients(spec, (tokens, features[0]), features[1])
    expected = x @ layer.dense_weight().T + layer.bias
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, inputs, grad)
    with el.backend(backend, recompute=recompute):
        y = layer(x)
        found = torch.autograd.grad(y, inputs, grad)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_one_tile_or_many(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for tokens in (1, 40, 3000):
            layer = el.Linear(1000, 1100, "btt(rank=2)", dtype=torch.float64)
            x = torch.randn(tokens, 1000, dtype=torch.float64, requires_grad=True)
            inputs = [x, *layer.parameters()]
            expected = x @ layer.dense_weight().T + layer.bias
            torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-11)
            grad = torch.randn_like(expected)
            wanted = torch.autograd.grad(expected, inputs, grad)
            for a, b in zip(torch.autograd.grad(layer(x), inputs, grad), wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("spec", SPECS)
def test_every_subset_of_gradients(spec: str) -> None:
    layer, x, inputs = layer_and_gradients(spec)
    grad = torch.randn(37, 80, dtype=torch.float64)
    wanted = torch.autograd.grad(layer(x), inputs, grad)
    for mask in range(1, 2 ** len(inputs)):
        for i, tensor in enumerate(inputs):
            tensor.grad = None
            tensor.requires_grad_(bool(mask >> i & 1))
        layer(x).backward(grad)
        for i, tensor in enumerate(inputs):
            if mask >> i & 1:
                torch.testing.assert_close(tensor.grad, wanted[i])
            else:
                assert tensor.grad is None


@pytest.mark.parametrize("spec", SPECS)
def test_every_output_is_written(spec: str) -> None:
    """torch then fills all memory that it hands out with NaN."""
    layer, x, inputs = layer_and_gradients(spec)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        y = layer(x)
        found = [y, *torch.autograd.grad(y, inputs, torch.ones_like(y))]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(tensor.isfinite().all() for tensor in found)


@pytest.mark.parametrize("spec", SPECS)
def test_strided_expanded_and_empty_inputs(spec: str) -> None:
    layer, _, _ = layer_and_gradients(spec)
    double = {"dtype": torch.float64}
    for x in (
        torch.randn(48, 7, **double).T,
        torch.randn(1, 48, **double).expand(7, 48),
        torch.randn(7, 96, **double)[:, ::2],
        torch.randn(0, 48, **double),
        torch.randn(3, 0, 48, **double),
        torch.randn(48, **double),
    ):
        x.requires_grad_()
        expected = x @ layer.dense_weight().T + layer.bias
        grad = torch.randn(1, **double).expand_as(expected)  # as of a sum: no memory behind it
        y = layer(x)
        torch.testing.assert_close(y, expected)
        inputs = [x, *layer.parameters()]
        wanted = torch.autograd.grad(expected, inputs, grad)
        for a, b in zip(torch.autograd.grad(y, inputs, grad), wanted, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("spec", SPECS)
def test_activations_may_work_in_place(spec: str) -> None:
    layer, x, inputs = layer_and_gradients(spec)
    y = torch.nn.functional.relu(layer(x), inplace=True)
    expected = torch.relu(x @ layer.dense_weight().T + layer.bias)
    wanted = torch.autograd.grad(expected.sum(), inputs)
    for a, b in zip(torch.autograd.grad(y.sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_exact_as_a_dense_product(spec: str, dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(0)
    exact_layer = el.Linear(256, 256, spec, dtype=torch.float64)
    layer = el.Linear(256, 256, spec, dtype=dtype)
    if ops.reason_unsupported(backend, layer.structure, dtype, CPU):
        return
    layer.load_state_dict(exact_layer.state_dict())
    exact_layer.load_state_dict(layer.state_dict())  # rounded in the same way
    x = torch.randn(64, 256, dtype=dtype)
    weight = exact_layer.dense_weight().to(dtype)
    dense_error = (x @ weight.T - x.double() @ weight.double().T).square().mean().sqrt()
    error = (layer(x) - exact_layer(x.double())).square().mean().sqrt()
    # every factor rounds once more than a dense layer, whose weight is rounded too
    steps = max(len(term.factors) for term in layer.structure.terms)
    assert error < (steps + 1) * dense_error + 2 * torch.finfo(dtype).eps * weight.double().norm(dim=1).mean()
