"""The check before every product: operands that do not fit are refused by every backend at every entry point.

Where the check is missing, some of these tests end in a segmentation fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.families import PATTERNS, SAMPLES, structures
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import einlinear as el
from einlinear import ops
from einlinear.ops import backends
from einlinear.ops.operands import Operands
from einlinear.structures import Structure

CPU = torch.device("cpu")
SMALL = el.structure("dense", 2, 2)
RUNNING = [name for name in ops.BACKENDS if ops.reason_unsupported(name, SMALL, torch.float32, CPU) is None]
OPERATORS = [name for name in RUNNING if name != "reference"]


class DrawnOperands:
    """The operands of a product of 48 to 60 features, and all ways to compute it."""

    def __init__(self, spec: str = "btt(rank=2)", n: int = 5, dtype: torch.dtype = torch.float32) -> None:
        self.structure: Structure = el.structure(spec, 48, 60)
        self.factors: list[Any] = [torch.randn(factor.shape, dtype=dtype) for factor in self.structure.factors]
        self.bias: Any = torch.randn(60, dtype=dtype)
        self.x: Any = torch.randn(n, 48, dtype=dtype)
        self.grad: Any = torch.randn(n, 60, dtype=dtype)

    def forward(self) -> Iterator[Callable[[], Tensor]]:
        """The output, by every backend and entry point, with gradients and without."""
        leaves = [t.requires_grad_() if _can_train(t) else t for t in self.factors]
        for name in RUNNING:
            yield lambda name=name: ops.linear(self.structure, leaves, self.x, self.bias, name)
            yield torch.no_grad()(lambda name=name: ops.linear(self.structure, leaves, self.x, self.bias, name))
        for name in OPERATORS:
            arguments = (self.bias, None, None, self.structure.spec, 60, name)
            yield lambda arguments=arguments: torch.ops.einlinear.linear(self.x, leaves, *arguments)
            found = backends.find(name)
            yield lambda found=found: found.forward(Operands(self.structure, self.factors, self.x, self.bias), False)[0]

    def backward(self) -> Iterator[Callable[[], list[Tensor]]]:
        """The gradients of x and of the factors."""
        wanted = [True] * len(self.structure.factors)
        plain = [t.detach() if isinstance(t, Tensor) else t for t in self.factors]
        for name in OPERATORS:
            yield lambda name=name: torch.ops.einlinear.linear_backward(
                self.grad, self.x, plain, None, None, self.structure.spec, name, True, wanted
            )
            found = backends.find(name)
            yield lambda found=found: _flat(
                found.backward(Operands(self.structure, plain, self.x), self.grad, [], True, wanted)
            )


def _can_train(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.is_leaf and not tensor.is_sparse


def _flat(gradients: Any) -> list[Tensor]:
    grad_x, _, grad_factors = gradients
    return [grad_x, *grad_factors]


def released(tensor: Tensor, share: float = 0.0) -> Tensor:
    """A tensor whose storage holds only a share of what it needs."""
    tensor = tensor.clone()
    storage = tensor.untyped_storage()
    storage.resize_(int(storage.nbytes() * share))
    return tensor


def part_of_released(tensor: Tensor) -> Tensor:
    """As FSDP has parameters: views into one large tensor, whose storage it empties."""
    flat = torch.cat([torch.zeros(10_000, dtype=tensor.dtype), tensor.flatten()])
    view = flat[10_000:].view(tensor.shape)
    flat.untyped_storage().resize_(0)
    return view


def quantized(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.quint8)


def strided_beyond(tensor: Tensor) -> Tensor:
    """Half of every row of a storage that was cut down to the size of all halves."""
    wide = torch.cat([tensor, tensor], -1)
    half = wide[..., : tensor.shape[-1]]
    wide.untyped_storage().resize_(tensor.nbytes)
    return half


# what a tensor is replaced by; the error that follows, and what it says
WRONG: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "on meta": (lambda t: t.to("meta"), RuntimeError, "on meta.* has no values yet"),
    "of float64": (
        lambda t: t.double(),
        RuntimeError,
        r"of torch\.float(32|64), but .* of torch\.float(32|64): convert",
    ),
    "of bfloat16": (lambda t: t.bfloat16(), RuntimeError, r"torch\.bfloat16"),
    "of integers": (lambda t: t.int(), RuntimeError, r"torch\.int32"),
    "complex": (lambda t: t.to(torch.complex64), RuntimeError, r"torch\.complex64"),
    "quantized": (quantized, RuntimeError, r"torch\.quint8"),
    "longer": (lambda t: torch.cat([t, t], -1), RuntimeError, r"has shape \(.*\), but .* needs \(|in_features=48"),
    "with one more dimension": (lambda t: t[None], RuntimeError, r"has shape \(1, |\(n, features\)"),
    "of one entry": (lambda t: t.flatten()[:1].reshape([1] * t.dim()), RuntimeError, "shape"),
    "a scalar": (lambda t: t.flatten()[0].clone(), RuntimeError, r"shape \(\)"),
    "empty": (lambda t: t[..., :0], RuntimeError, "shape"),
    "released": (released, RuntimeError, "the memory of .* is smaller than its shape"),
    "half released": (lambda t: released(t, 0.5), RuntimeError, "the memory of .* is smaller"),
    "part of released": (part_of_released, RuntimeError, "the memory of .* is smaller"),
    "strided beyond": (strided_beyond, RuntimeError, "the memory of .* is smaller"),
    "sparse": (lambda t: t.to_sparse(), RuntimeError, "layout torch.sparse_coo, but must be strided"),
    "opaque": (lambda t: t.to_mkldnn(), RuntimeError, "layout torch._mkldnn, but must be strided"),
}


pytestmark = pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:UserWarning", "ignore::DeprecationWarning")


def refuse(
    ways: Iterator[Callable[[], Any]], error: type[Exception] | tuple[type[Exception], ...], message: str
) -> None:
    count = 0
    for way in ways:
        with pytest.raises(error, match=message):
            way()
        count += 1
    assert count >= len(OPERATORS)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_factor_that_does_not_fit(wrong: str) -> None:
    replace, error, message = WRONG[wrong]
    for i in range(2):
        product = DrawnOperands()
        product.factors[i] = replace(product.factors[i])
        refuse(product.forward(), error, message)
        refuse(product.backward(), error, message)
        with pytest.raises(error, match=message):
            ops.dense_weight(product.structure, product.factors)


@pytest.mark.parametrize("wrong", [name for name in WRONG if name != "strided beyond"])
def test_a_bias_that_does_not_fit(wrong: str) -> None:
    replace, error, message = WRONG[wrong]
    product = DrawnOperands()
    product.bias = replace(product.bias)
    refuse(product.forward(), error, message)


@pytest.mark.parametrize("wrong", [name for name in WRONG if name != "with one more dimension"])
def test_an_input_that_does_not_fit(wrong: str) -> None:
    replace, error, message = WRONG[wrong]
    product = DrawnOperands()
    product.x = replace(product.x)
    # a backend that is named says first what it cannot do, an operator that no structure has such a size
    refuse(product.forward(), (error, ValueError), f"{message}|cannot run this|in_features")
    refuse(product.backward(), (error, ValueError), f"{message}|cannot run this|in_features")
    layer = el.Linear(48, 60, "btt(rank=2)")
    refuse(iter([lambda: layer(product.x), torch.no_grad()(lambda: layer(product.x))] * 3), error, message)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_gradient_that_does_not_fit(wrong: str) -> None:
    replace, error, message = WRONG[wrong]
    product = DrawnOperands()
    product.grad = replace(product.grad)
    # the operator takes the number of outputs from the gradient
    refuse(product.backward(), (error, ValueError), f"{message}|out_features|outputs")


def test_a_number_of_factors_that_does_not_fit() -> None:
    product = DrawnOperands()
    factors = product.factors
    for wrong in ([], factors[:1], factors * 2):
        product.factors = wrong
        refuse(product.forward(), ValueError, f"btt.* has 2 factors, not {len(wrong)}")
        refuse(product.backward(), ValueError, f"btt.* has 2 factors, not {len(wrong)}|needs_factors|shorter|longer")
        with pytest.raises(ValueError, match="has 2 factors"):
            ops.dense_weight(product.structure, wrong)


def test_what_is_not_a_tensor() -> None:
    product = DrawnOperands()
    for name in RUNNING:
        with pytest.raises(TypeError, match="factor B must be a tensor, not NoneType"):
            ops.linear(product.structure, [product.factors[0], None], product.x, None, name)
        with pytest.raises(TypeError, match="the bias must be a tensor, not float"):
            ops.linear(product.structure, product.factors, product.x, 0.0, name)
        with pytest.raises(TypeError, match="the input must be a tensor, not list"):
            ops.linear(product.structure, product.factors, product.x.tolist(), None, name)


@pytest.mark.parametrize("spec", [spec for specs in SAMPLES.values() for spec in specs] + PATTERNS)
def test_every_factor_of_every_structure(spec: str) -> None:
    structure = structures(spec, [(36, 36), (64, 64)])[0]
    x = torch.randn(3, structure.in_features)
    factors = [torch.randn(factor.shape) for factor in structure.factors]
    for i, factor in enumerate(factors):
        for wrong in (factor.unsqueeze(-1), torch.cat([factor, factor]), factor[:0], released(factor), factor.double()):
            replaced = [*factors[:i], wrong, *factors[i + 1 :]]
            for name in RUNNING:
                with pytest.raises(RuntimeError, match=f"factor {structure.factors[i].name}|factor A|torch.float64"):
                    ops.linear(structure, replaced, x, None, name)


def test_layers_whose_parameters_were_changed() -> None:
    x = torch.randn(2, 64)

    def refused(change: Callable[[Any], object], message: str) -> None:
        for layer, name in ((el.Linear(64, 64, "btt"), "B"), (el.MoELinear(64, 64, "btt", experts=3), "B")):
            change(layer)
            for way in (layer, torch.no_grad()(layer)):
                with pytest.raises(RuntimeError, match=message):
                    way(x)
            assert name in dict(layer.named_parameters())

    def double_factors(layer: Any) -> None:
        layer.A.data, layer.B.data = layer.A.data.double(), layer.B.data.double()

    refused(
        lambda layer: setattr(layer, "B", nn.Parameter(layer.B.to("meta"))), "factor B is on meta, but factor A on cpu"
    )
    refused(double_factors, "factor A of torch.float64|the layer of torch.float64")
    refused(lambda layer: layer.B.untyped_storage().resize_(0), "the memory of factor B is smaller")
    refused(lambda layer: setattr(layer.B, "data", torch.zeros(3)), r"factor B has shape \(3,\)")
    refused(lambda layer: setattr(layer, "bias", nn.Parameter(torch.zeros(1))), r"the bias has shape \(1,\)")
    with pytest.raises(
        RuntimeError, match="the input is on cpu, but the layer on meta: a tensor on meta has no values"
    ):
        el.Linear(64, 64, "btt(rank=2)", device="meta")(x)


def test_memory_that_is_released_between_forward_and_backward() -> None:
    for name in RUNNING:
        layer, x = el.Linear(64, 64, "btt"), torch.randn(40, 64, requires_grad=True)
        with el.backend(name):
            y = layer(x)
        layer.A.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=r"memory of factor A is smaller|storage of size 0"):
            y.sum().backward()


@pytest.mark.parametrize("backend", OPERATORS)
def test_intermediates_that_come_back_as_something_else(backend: str) -> None:
    """From the hooks with which activations are compressed, or moved to another device."""
    layer, x = el.Linear(512, 512, "low_rank(rank=32)"), torch.randn(40, 512, requires_grad=True)

    def backward(unpack: Callable[[Tensor], Tensor]) -> Tensor:
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: t, lambda t: t if isinstance(t, nn.Parameter) or t.shape == x.shape else unpack(t)
        )
        with el.backend(backend, recompute=False), hooks:
            y = layer(x)
        return torch.autograd.grad(y.square().sum(), layer.B)[0]

    expected = backward(lambda t: t)
    for same in (lambda t: torch.stack([t, t], -1)[..., 0], lambda t: torch._neg_view(-t)):
        torch.testing.assert_close(backward(same), expected)
    for other in (lambda t: t.half(), lambda t: t[:-1], lambda t: t.to("meta"), released):
        with pytest.raises(RuntimeError, match="intermediate"):
            backward(other)


class Routed(DrawnOperands):
    """The operands of a product with one of four matrices per token, and all ways to compute it."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = [torch.randn(4, *factor.shape) for factor in self.structure.factors]
        self.indices: Any = torch.randint(4, (5, 2))
        self.gates: Any = torch.rand(5, 2)

    def routing(self) -> ops.Routing:
        return ops.Routing(self.indices, self.gates)

    def forward(self) -> Iterator[Callable[[], Tensor]]:
        for name in RUNNING:
            for requires_grad in (True, False):

                def routed(name: str = name, requires_grad: bool = requires_grad) -> Tensor:
                    factors = [t.detach().requires_grad_(requires_grad) for t in self.factors]
                    with el.backend(name):
                        return ops.linear(self.structure, factors, self.x, self.bias, routing=self.routing())

                yield routed
        for name in OPERATORS:
            yield lambda name=name: torch.ops.einlinear.linear(
                self.x, self.factors, self.bias, self.indices, self.gates, self.structure.spec, 60, name
            )

    def backward(self) -> Iterator[Callable[[], list[Tensor]]]:
        needs = True, [True] * len(self.factors)
        for name in OPERATORS:
            yield lambda name=name: torch.ops.einlinear.linear_backward(
                self.grad, self.x, self.factors, self.indices, self.gates, self.structure.spec, name, *needs
            )


ROUTED: dict[str, tuple[str, Callable[[Any], Any], type[Exception], str]] = {
    "fewer matrices in one stack": ("B", lambda t: t[:3], RuntimeError, r"factor B has shape \(3, "),
    "no stack": ("A", lambda t: t[0], RuntimeError, r"factor A has shape"),
    "a stack of stacks": ("B", lambda t: t[None], RuntimeError, r"factor B has shape \(1, 4, "),
    "a stack on meta": ("B", lambda t: t.to("meta"), RuntimeError, "factor B is on meta"),
    "a stack that was released": ("B", released, RuntimeError, "the memory of factor B is smaller"),
    "an expert too many": ("indices", lambda t: t.fill_(4), IndexError, "expert 4: there are 4, from 0 to 3"),
    "an expert below zero": ("indices", lambda t: t - 5, IndexError, "there are 4, from 0 to 3"),
    "indices in 32 bits": ("indices", lambda t: t.int(), RuntimeError, "indices are of torch.int32"),
    "indices on meta": ("indices", lambda t: t.to("meta"), RuntimeError, "indices are on meta"),
    "indices that were released": ("indices", released, RuntimeError, "the memory of the tensor of indices is smaller"),
    "indices of too few tokens": ("indices", lambda t: t[:4], RuntimeError, r"both must be \(5, active\)"),
    "gates of too few tokens": ("gates", lambda t: t[:4], RuntimeError, r"both must be \(5, active\)"),
    "gates on meta": ("gates", lambda t: t.to("meta"), RuntimeError, "tensor of gates is on meta"),
    "gates that were released": ("gates", released, RuntimeError, "the memory of the tensor of gates is smaller"),
    "an input in float64": ("x", lambda t: t.double(), RuntimeError, "torch.float64"),
    "a bias of one entry": ("bias", lambda t: t[:1], RuntimeError, "the bias has shape"),
}


@pytest.mark.parametrize("wrong", ROUTED)
def test_experts_that_do_not_fit(wrong: str) -> None:
    name, replace, error, message = ROUTED[wrong]
    product = Routed()
    if name in "AB":
        product.factors["AB".index(name)] = replace(product.factors["AB".index(name)])
    else:
        setattr(product, name, replace(getattr(product, name)))
    refuse(product.forward(), error, message)
    if name != "bias":
        refuse(product.backward(), error, message)


def test_every_backend_is_behind_the_check() -> None:
    """Also those that cannot run here."""
    draw = DrawnOperands()
    operands = Operands(draw.structure, [draw.factors[0], draw.factors[1][:1]], draw.x)
    for name in ops.BACKENDS:
        if name == "reference":
            with pytest.raises(ValueError, match="'reference' consists of plain operators"):
                backends.find(name)
            continue
        for way in (
            lambda found: found.forward(operands, False),
            lambda found: found.backward(operands, draw.grad, [], True, [True] * 2),
        ):
            with pytest.raises(RuntimeError, match="factor B has shape"):
                way(backends.find(name))


def test_operators_of_backends_that_cannot_run() -> None:
    product = DrawnOperands()
    factors = [f.cfloat() for f in product.factors]
    arguments = (product.x.cfloat(), factors, None, None, None, product.structure.spec, 60)
    if "cpu" in RUNNING:
        with pytest.raises(RuntimeError, match="'cpu' cannot run this: it computes in real numbers"):
            torch.ops.einlinear.linear(*arguments, "cpu")
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        torch.ops.einlinear.linear(*arguments, "fast")


def test_what_is_traced_is_checked_as_well() -> None:
    product = DrawnOperands()
    product.factors[1] = product.factors[1][:1]
    for name in RUNNING:
        with FakeTensorMode() as mode, el.backend(name):
            x, *factors = [mode.from_tensor(t) for t in (product.x, *product.factors)]
            with pytest.raises(RuntimeError, match="factor B has shape"):
                ops.linear(product.structure, factors, x)
    with pytest.raises(RuntimeError, match="factor B has shape"):
        torch.vmap(lambda x: ops.linear(product.structure, product.factors, x))(product.x)


def test_unusual_operands_that_do_fit() -> None:
    """Any strides, also none; values that torch has not yet negated; no tokens."""
    product = DrawnOperands(dtype=torch.float64)
    dense = ops.dense_weight(product.structure, product.factors)
    expected = product.x @ dense.T + product.bias
    unusual: dict[str, Callable[[Tensor], Tensor]] = {
        "transposed": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
        "every other": lambda t: torch.stack([t, t], -1)[..., 0],
        "negated later": lambda t: torch._neg_view(-t),
        "part of a larger one": lambda t: torch.cat([t, t])[len(t) :],
    }
    for change in unusual.values():
        factors, x, bias, grad = [
            [change(f) for f in product.factors],
            *map(change, (product.x, product.bias, product.grad)),
        ]
        torch.testing.assert_close(ops.dense_weight(product.structure, factors), dense)
        for name in RUNNING:
            torch.testing.assert_close(ops.linear(product.structure, factors, x, bias, name), expected)
            leaves = [t.detach().requires_grad_() for t in (x, *factors)]
            y = ops.linear(product.structure, leaves[1:], leaves[0], bias, name)
            found = torch.autograd.grad(y, leaves, grad)
            torch.testing.assert_close(found[0], product.grad @ dense)
        routed = Routed()
        y = ops.linear(routed.structure, routed.factors, routed.x, routing=routed.routing())
        stacks = [change(f) for f in routed.factors]
        for name in RUNNING:
            # an odd number of negations, so that one that is forgotten shows
            found = ops.linear(routed.structure, stacks, change(routed.x), None, name, routed.routing())
            torch.testing.assert_close(found, y, rtol=1e-4, atol=1e-4)
    expanded = [f.flatten()[0].expand(f.shape) for f in product.factors]
    for name in RUNNING:
        y = ops.linear(product.structure, expanded, product.x, None, name)
        torch.testing.assert_close(y, product.x @ ops.dense_weight(product.structure, expanded).T)
        assert ops.linear(product.structure, product.factors, product.x[5:], product.bias, name).shape == (0, 60)


def test_layers_on_meta_say_the_shape() -> None:
    for layer in (el.Linear(64, 48, "btt", device="meta"), el.MoELinear(64, 48, "btt", experts=3, device="meta")):
        y = layer(torch.randn(2, 3, 64, device="meta"))
        assert y.is_meta
        assert y.shape == (2, 3, 48)


def test_complex_numbers_are_left_to_the_reference() -> None:
    """Conjugation included, which the gradients of the others would lack."""
    product = DrawnOperands(dtype=torch.complex64)
    x = product.x.conj().requires_grad_()
    y = ops.linear(product.structure, product.factors, x)
    dense = ops.dense_weight(product.structure, product.factors)
    torch.testing.assert_close(y, x @ dense.T)
    (found,) = torch.autograd.grad(y, x, product.grad)
    torch.testing.assert_close(found, product.grad @ dense.conj())
    stacks = [torch.stack([factor, factor]) for factor in product.factors]
    y = ops.linear(product.structure, stacks, x, routing=ops.Routing(torch.zeros(5, 1).long(), torch.ones(5, 1)))
    torch.testing.assert_close(y, x @ dense.T)
    torch.testing.assert_close(torch.autograd.grad(y, x, product.grad)[0], product.grad @ dense.conj())
    for name in OPERATORS:
        with pytest.raises(RuntimeError, match=r"'.*' cannot run this: .* comput"):
            ops.linear(product.structure, product.factors, x, None, name)


def test_routers_that_do_not_fit() -> None:
    """A router on meta gave the experts that were in the memory before."""
    x = torch.randn(5, 64)
    for change, message in (
        (lambda router: router.to("meta"), "the router is on meta, but the input on cpu"),
        (lambda router: router[:2], r"the router has shape \(2, 64\), but 4 experts need \(experts=4"),
        (lambda router: router[:1], "4 experts need"),
        (lambda router: router[None], "4 experts need"),
    ):
        layer = el.MoELinear(64, 48, "btt", experts=4)
        layer.router = nn.Parameter(change(layer.router.data))
        with pytest.raises(RuntimeError, match=message):
            layer(x)


def test_weights_that_cannot_be_projected() -> None:
    structure = el.structure("btt", 64, 48)
    weight = torch.randn(48, 64)
    with pytest.raises(RuntimeError, match="the memory of the weight is smaller"):
        ops.project(structure, released(weight.clone()))
    with pytest.raises(ValueError, match="meta device has no values"):
        ops.project(structure, weight.to("meta"))
    for dtype in (torch.int64, torch.int8, torch.bool):
        with pytest.raises(TypeError, match="dequantize"):
            ops.project(structure, weight.to(dtype))
