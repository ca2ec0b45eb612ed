"""Weight normalisation: the autograd function gives what torch's operators give, and leaves transforms to these."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import einlinear as el
from einlinear.nn import weight_normalization
from einlinear.nn.weight_normalization import Matrix, normalize

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
# of factors, without the axis of a stack
SHAPES = [(3, 2, 4, 3), (1, 7), (13, 5)]


def operands(
    dtype: torch.dtype = torch.float64, stack: int | None = None, with_gammas: bool = True
) -> tuple[list[Matrix], list[Tensor], list[Tensor]]:
    """A factor that is too large, one that is small and left alone, and one that is not contiguous."""
    torch.manual_seed(0)
    first = () if stack is None else (stack,)
    matrices = [Matrix(0.5, shape, len(first)) for shape in SHAPES]
    large, small, other = (torch.randn(*first, *shape, dtype=torch.float64) for shape in SHAPES)
    factors = [2 * large, 0.1 * small, other.mT.contiguous().mT]
    gammas = [torch.randn(first or (1,), dtype=torch.float64) for _ in factors] if with_gammas else []
    return matrices, *([t.to(dtype).requires_grad_() for t in each] for each in (factors, gammas))


def gradients(outputs: list[Tensor], tensors: list[Tensor]) -> tuple[Tensor | None, ...]:
    torch.manual_seed(1)
    grads = [torch.randn_like(y) for y in outputs]
    return torch.autograd.grad(outputs, tensors, grads, allow_unused=True)


@pytest.mark.parametrize("stack", [None, 4])
@pytest.mark.parametrize("with_gammas", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_it_gives_what_operators_give(dtype: torch.dtype, with_gammas: bool, stack: int | None) -> None:
    given = operands(dtype, stack, with_gammas)
    found, expected = normalize(*given), weight_normalization._plain(*given)
    is_function = {type(y.grad_fn).__name__ for y in found} == {"_NormalizeBackward"}
    assert is_function == (stack is None)
    close: dict[str, Any] = {"rtol": TOLERANCES[dtype], "atol": TOLERANCES[dtype]}
    tensors = [*given[1], *given[2]]
    with torch.no_grad():
        without = normalize(*given)
    for a, b, c in zip(found, expected, without, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, **close)
        assert torch.equal(a, c)
        assert not c.requires_grad
    for p, a, b in zip(tensors, gradients(found, tensors), gradients(expected, tensors), strict=True):
        assert a is not None
        assert a.shape == p.shape
        size = 1.0 if b is None else float(b.abs().max())
        torch.testing.assert_close(a / size, b if b is None else b / size, **close)


@pytest.mark.parametrize("index", range(6))
def test_gradients_of_some_alone(index: int) -> None:
    matrices, factors, gammas = operands()
    tensors = [*factors, *gammas]
    wanted = tensors[index]
    for p in tensors:
        p.requires_grad_(p is wanted)
    (found,) = gradients(normalize(matrices, factors, gammas)[index % 3 :][:1], [wanted])
    (expected,) = gradients(weight_normalization._plain(matrices, factors, gammas)[index % 3 :][:1], [wanted])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("stack", [None, 2])
def test_gradients_of_gradients(stack: int | None) -> None:
    matrices, factors, gammas = operands(stack=stack)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(normalize(matrices, tensors[:3], tensors[3:]))

    assert torch.autograd.gradcheck(function, (*factors, *gammas))
    assert torch.autograd.gradgradcheck(function, (*factors, *gammas))


def test_one_matrix_twice() -> None:
    matrices, (factor, *_), (gamma, *_) = operands()
    given = matrices[:1] * 2, [factor, factor], [gamma, gamma]
    tensors = [factor, gamma]
    for a, b in zip(gradients(normalize(*given), tensors), gradients(weight_normalization._plain(*given), tensors)):
        torch.testing.assert_close(a, b)


def test_float16_of_a_large_norm() -> None:
    """The norm, 500, fits into float16; its square does not."""
    factor = torch.full((500, 500), 1.0, dtype=torch.float16)
    (found,) = normalize([Matrix(0.25, (500, 500))], [factor], [])
    torch.testing.assert_close(found, torch.full_like(factor, 0.25))


def test_a_number_that_is_none_is_not_hidden() -> None:
    matrices, factors, gammas = operands(torch.float32)
    with torch.no_grad():
        factors[0][0, 0, 0, 0] = torch.nan
    for a, b in zip(normalize(matrices, factors, gammas), weight_normalization._plain(matrices, factors, gammas)):
        assert torch.equal(a.isnan(), b.isnan())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, in forward mode
def test_transforms_and_batched_gradients() -> None:
    layer = el.Linear(16, 24, "btt", normalize=True, dtype=torch.float64)
    nn.init.constant_(layer.gamma_A, 1.5)
    with torch.no_grad():
        layer.A.mul_(2)
    x, parameters = torch.randn(5, 16, dtype=torch.float64), dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, parameters, x)
        return y.square().sum()

    found = torch.func.grad(loss)(parameters, x)
    expected = torch.autograd.grad(loss(parameters, x), [*parameters.values()])
    for name, grad in zip(parameters, expected, strict=True):
        torch.testing.assert_close(found[name], grad)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:, None])
    torch.testing.assert_close(each["A"].sum(0), found["A"])
    y = layer(x)
    basis = torch.eye(y.numel(), dtype=torch.float64).view(-1, *y.shape)
    (batched,) = torch.autograd.grad(y, layer.A, basis, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(y, layer.A, each, retain_graph=True)[0] for each in basis]
    torch.testing.assert_close(batched, torch.stack(single))
    _, tangent = torch.func.jvp(lambda a: loss({**parameters, "A": a}, x), (layer.A,), (torch.ones_like(layer.A),))
    torch.testing.assert_close(tangent, found["A"].sum())
