"""The Triton kernels against plain einsum in float64.

Without a GPU the kernels run in Triton's interpreter, which must be switched on before triton is imported: then this
file runs itself once more, in a process that has TRITON_INTERPRET=1. See also test_triton_plans.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import PATTERNS, SAMPLES
from tests.lab.data.samples import needs
from torch import Tensor

import einlinear as el
from einlinear import ops
from einlinear.ops import reference
from einlinear.ops.operands import Operands, Routing
from einlinear.ops.triton import launch
from einlinear.ops.triton import triton_backend as kernels
from einlinear.ops.triton.launch import strided_steps
from einlinear.structures import DoesNotFit, Structure

pytestmark = [needs("triton"), pytest.mark.slow]

INTERPRETED = launch.interpreting()
RUNS = INTERPRETED or torch.cuda.is_available()
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")

SPECS = [spec for specs in SAMPLES.values() for spec in specs] + PATTERNS
CASES = {  # features in and out, tokens: rectangular and padded to either side, square; odd, one
    torch.float32: (16, 23, 17),
    torch.bfloat16: (23, 16, 5),
    torch.float16: (16, 16, 1),
}
# The interpreter is slow: every structure in float32 and in one of the halves.
PRODUCTS = [
    (spec, dtype)
    for i, spec in enumerate(SPECS)
    for dtype in CASES
    if not INTERPRETED or dtype is not (torch.bfloat16, torch.float16)[i % 2]
]
# features, tokens, experts of a token, their load
ROUTED_CASES: list[tuple[tuple[int, int], int, int, str, torch.dtype]] = [
    ((16, 23), 40, 2, "random", torch.float32),
    ((23, 16), 20, 3, "the same experts", torch.bfloat16),
    ((16, 16), 30, 1, "one is empty", torch.float16),
    ((16, 16), 1, 2, "random", torch.float32),
]
ERROR = 3  # at most this many times that of torch in the same dtype


def draw(spec: str, in_features: int, out_features: int, n: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """A structure; factors, x, bias and the output's gradient."""
    try:
        s = el.structure(spec, in_features, out_features)
    except DoesNotFit as error:
        pytest.skip(str(error))
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    factors = [randn(*f.shape) / f.fan_in**0.5 for f in s.factors]
    return s, factors, randn(n, in_features), randn(out_features), randn(n, out_features)


def by_torch(s: Structure, factors: Sequence[Tensor], x: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    """The output and the gradients of x and the factors, by plain einsum."""
    inputs = [tensor.detach().requires_grad_() for tensor in (x, *factors)]
    y = reference.apply(Operands(s, inputs[1:], inputs[0])) + bias
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def error(found: Tensor | None, wanted: Tensor) -> float:
    assert found is not None
    assert found.shape == wanted.shape
    assert found.isfinite().all()
    return float(torch.linalg.norm(found.double() - wanted) / torch.linalg.norm(wanted))


def double(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Memory that a kernel is given to write is full of NaN."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which torch's own products refuse, on a GPU
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.ones(1).new_empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, kernels are compiled for one tile, not for all that could be faster."""
    monkeypatch.setattr(launch, "TUNE", False)


@pytest.fixture(autouse=True, scope="session")
def quick_arithmetic() -> None:
    """The interpreter does not look for overflows in sums of indices, which takes a third of its time."""
    if INTERPRETED:
        from triton.runtime import interpreter

        interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


@pytest.mark.skipif(RUNS, reason="the tests run here")
@pytest.mark.parametrize("of", ["TestKernels", "TestRouted"])
def test_in_the_interpreter(of: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::{of}"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


class TestKernels:
    """Outputs and gradients of products."""

    __test__ = RUNS

    @pytest.mark.parametrize(("spec", "dtype"), PRODUCTS, ids=str)
    def test_output_and_gradients(self, spec: str, dtype: torch.dtype) -> None:
        s, factors, x, bias, grad = draw(spec, *CASES[dtype], dtype)
        assert kernels.reason_unsupported(s, dtype, DEVICE) is None
        exact = by_torch(s, double(factors), x.double(), bias.double(), grad.double())
        dense = torch.addmm(bias, x, ops.dense_weight(s, double(factors)).to(dtype).T)
        theirs = map(error, by_torch(s, factors, x, bias, grad), exact)
        bounds = [ERROR * max(error(dense, exact[0]), one) for one in theirs]
        if INTERPRETED and dtype == torch.bfloat16:  # which the interpreter truncates instead of rounding
            bounds = [2 * bound for bound in bounds]
        y, saved = kernels.forward(Operands(s, factors, x, bias), True)
        grad_x, _, grad_factors = kernels.backward(Operands(s, factors, x), grad, saved, True, [True] * len(factors))
        for found, wanted, bound in zip([y, grad_x, *grad_factors], exact, bounds, strict=True):
            assert found is not None
            assert found.dtype == dtype
            assert error(found, wanted) <= bound
        if dtype == torch.float32:
            grad_x, _, nothing = kernels.backward(Operands(s, factors, x), grad, saved, True, [False] * len(factors))
            assert error(grad_x, exact[1]) <= bounds[1]
            assert nothing == [None] * len(factors)

    @pytest.mark.parametrize("spec", ["btt", "kronecker", "dyad", "tt(cores=3)"])
    def test_only_what_is_wanted(self, spec: str) -> None:
        """Without saved intermediates, every subset of the gradients is returned."""
        s, factors, x, bias, grad = draw(spec, 16, 16, 3, torch.float32)
        y, saved = kernels.forward(Operands(s, factors, x, None), False)
        exact = by_torch(s, double(factors), x.double(), torch.zeros_like(bias).double(), grad.double())
        assert error(y, exact[0]) < 1e-6
        assert saved == []
        for wanted in [(i == j for j in range(len(factors) + 1)) for i in range(len(factors) + 1)]:
            needs_x, *needs = wanted
            grad_x, _, grad_factors = kernels.backward(Operands(s, factors, x), grad, [], needs_x, needs)
            for found, need, right in zip([grad_x, *grad_factors], [needs_x, *needs], exact[1:], strict=True):
                assert (error(found, right) < 1e-6) if need else found is None

    @pytest.mark.parametrize("spec", SPECS)
    def test_no_tokens(self, spec: str) -> None:
        s, factors, x, bias, grad = draw(spec, 16, 16, 0, torch.bfloat16)
        y, saved = kernels.forward(Operands(s, factors, x, bias), True)
        grad_x, _, grad_factors = kernels.backward(Operands(s, factors, x), grad, saved, True, [True] * len(factors))
        assert y.shape == (0, 16)
        assert grad_x is not None
        assert grad_x.shape == (0, 16)
        for found, factor in zip(grad_factors, factors, strict=True):
            assert torch.equal(found, torch.zeros_like(factor))

    @pytest.mark.parametrize("spec", ["kronecker", "monarch(blocks=2)"])
    def test_many_tokens_and_any_strides(self, spec: str) -> None:
        """Tokens are split among programs, with a ragged end; inputs are strided, transposed and expanded."""
        s, factors, x, bias, grad = draw(spec, 16, 16, 270, torch.float32)
        first = strided_steps(s)[0][0]
        assert 2 * launch.share_of_tokens(first, 4) < 270
        factors = [factor.transpose(0, -1).contiguous().transpose(0, -1) for factor in factors]
        wide, ones = torch.cat([x, x], 1), grad[:1, :1].expand(270, 16)
        for inputs, grads in ((wide[:, 3:19], ones), (wide[:, ::2], grad.T.contiguous().T)):
            exact = by_torch(s, double(factors), inputs.double(), bias.double(), grads.double())
            y, saved = kernels.forward(Operands(s, factors, inputs, bias), True)
            grad_x, _, grad_factors = kernels.backward(
                Operands(s, factors, inputs), grads, saved, True, [True] * len(factors)
            )
            assert max(map(error, [y, grad_x, *grad_factors], exact)) < 2e-6

    def test_twice_the_same(self) -> None:
        s, factors, x, bias, grad = draw("btt", 16, 16, 300, torch.bfloat16)
        runs = []
        for _ in range(2):
            y, saved = kernels.forward(Operands(s, factors, x, bias), True)
            needed = [True] * len(factors)
            grad_x, _, grad_factors = kernels.backward(Operands(s, factors, x), grad, saved, True, needed)
            runs.append([y, grad_x, *grad_factors])
        assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))

    @pytest.mark.skipif(INTERPRETED, reason="there is nothing to measure in the interpreter")
    def test_tuned(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launch, "TUNE", True)
        s, factors, x, bias, grad = draw("kronecker", 256, 256, 1000, torch.bfloat16)
        exact = by_torch(s, double(factors), x.double(), bias.double(), grad.double())
        y, saved = kernels.forward(Operands(s, factors, x, bias), True)
        grad_x, _, grad_factors = kernels.backward(Operands(s, factors, x), grad, saved, True, [True, True])
        assert max(map(error, [y, grad_x, *grad_factors], exact)) < 0.02

    @pytest.mark.skipif(INTERPRETED, reason="there is nothing to measure in the interpreter")
    def test_tuned_mixtures(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launch, "TUNE", True)
        drawn = TestRouted.draw("kronecker", (256, 256), 1000, 2, "random", torch.bfloat16)
        s, factors, indices, x, gates, bias, grad = drawn
        exact = TestRouted.by_reference(s, double(factors), indices, *double((x, gates, bias, grad)))
        with torch.autocast("cuda", torch.bfloat16):
            y = kernels.forward(Operands(s, factors, x, bias, Routing(indices, gates)), False)[0]
            found = kernels.backward(
                Operands(s, factors, x, None, Routing(indices, gates)), grad.float(), [], True, [True, True]
            )
        assert {t.dtype for t in (y, *found[:2], *found[2]) if t is not None} == {torch.bfloat16}
        assert max(map(error, [y, *found[:2], *found[2]], exact)) < 0.02


LOADS: dict[str, Callable[[int, int], Tensor]] = {
    "random": lambda n, active: torch.rand(n, 5).topk(active).indices,
    "the same experts": lambda n, active: torch.arange(active).expand(n, active),
    "one is empty": lambda n, active: 1 + torch.rand(n, 4).topk(active).indices,
}


class TestRouted:
    """Products with one of several matrices, chosen for every token."""

    __test__ = RUNS

    @staticmethod
    def draw(spec: str, features: tuple[int, int], n: int, active: int, load: str, dtype: torch.dtype) -> Any:
        """A structure; stacked factors, the experts of every token; x, gates, bias and the output's gradient."""
        s, _, x, bias, grad = draw(spec, *features, n, dtype)
        torch.manual_seed(0)
        factors = [(torch.randn(5, *f.shape) / f.fan_in**0.5).to(DEVICE, dtype) for f in s.factors]
        gates = torch.rand(n, active).to(DEVICE, dtype)
        return s, factors, LOADS[load](n, active).to(DEVICE), x, gates, bias, grad

    @staticmethod
    def by_reference(
        s: Structure, factors: list[Tensor], indices: Tensor, x: Tensor, gates: Tensor, bias: Tensor, grad: Tensor
    ) -> list[Tensor]:
        """The output and the gradients of x, gates and factors, in plain operators."""
        inputs = [tensor.detach().requires_grad_() for tensor in (x, gates, *factors)]
        with el.backend("reference"):
            y = ops.linear(s, inputs[2:], inputs[0], bias, routing=Routing(indices, inputs[1]))
        return [y.detach(), *torch.autograd.grad(y, inputs, grad)]

    @pytest.mark.parametrize(
        ("spec", "features", "n", "active", "load", "dtype"),
        [
            (spec, *case)
            for i, spec in enumerate(["btt(rank=2)", "low_rank(rank=4)", "dense", "dyad"])
            for j, case in enumerate(ROUTED_CASES)
            # all four of the first structure, two of each other one
            if not INTERPRETED or i == 0 or j % 2 == i % 2
        ],
    )
    def test_output_and_gradients(
        self, spec: str, features: tuple[int, int], n: int, active: int, load: str, dtype: torch.dtype
    ) -> None:
        s, factors, indices, x, gates, bias, grad = self.draw(spec, features, n, active, load, dtype)
        exact = self.by_reference(s, double(factors), indices, *double((x, gates, bias, grad)))
        theirs = map(error, self.by_reference(s, factors, indices, x, gates, bias, grad), exact)
        floor = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
        bounds = [max(floor, ERROR * one) for one in theirs]
        if INTERPRETED and dtype == torch.bfloat16:
            bounds = [2 * bound for bound in bounds]
        y = kernels.forward(Operands(s, factors, x, bias, Routing(indices, gates)), False)[0]
        found = kernels.backward(
            Operands(s, factors, x, None, Routing(indices, gates)), grad, [], True, [True] * len(factors)
        )
        for mine, wanted, bound in zip([y, *found[:2], *found[2]], exact, bounds, strict=True):
            assert mine is not None
            assert mine.dtype == dtype
            assert error(mine, wanted) <= bound

    def test_blocks_of_several_tiles(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tiles_of, ratios = launch._tiles, set()

        def smallest(*args: Any) -> tuple[launch.Tile, ...]:
            tile = min(tiles_of(*args), key=lambda tile: dict(tile.blocks)["BLOCK_T"])
            ratios.add(launch.BLOCK_SLOTS // dict(tile.blocks)["BLOCK_T"])
            return (tile,)

        monkeypatch.setattr(launch, "_tiles", smallest)
        s, factors, indices, x, gates, bias, grad = self.draw("btt", (16, 16), 70, 1, "the same experts", torch.float32)
        exact = self.by_reference(s, double(factors), indices, *double((x, gates, bias, grad)))
        y = kernels.forward(Operands(s, factors, x, bias, Routing(indices, gates)), False)[0]
        found = kernels.backward(Operands(s, factors, x, None, Routing(indices, gates)), grad, [], True, [True, True])
        assert max(map(error, [y, *found[:2], *found[2]], exact)) < 2e-6
        assert min(ratios) > 1

    @pytest.mark.parametrize("spec", ["dyad", "tt(rank=2, cores=3)"])
    def test_only_what_is_wanted(self, spec: str) -> None:
        s, factors, indices, x, gates, _, grad = self.draw(spec, (8, 8), 4, 2, "random", torch.float32)
        product = Operands(s, factors, x, None, Routing(indices, gates))
        whole = kernels.backward(product, grad, [], True, [True] * len(factors))
        for wanted in range(len(factors) + 1):
            needs = [wanted == i for i in range(len(factors))]
            needs_x = wanted == len(factors)
            found = kernels.backward(product, grad, [], needs_x, needs)
            for mine, same, need in zip([*found[:2], *found[2]], [*whole[:2], *whole[2]], [needs_x] * 2 + needs):
                if not need:
                    assert mine is None
                    continue
                assert mine is not None
                torch.testing.assert_close(mine, same)

    def test_bad_tokens_spoil_only_their_experts(self) -> None:
        s, factors, indices, x, gates, bias, grad = self.draw("btt", (16, 16), 60, 1, "random", torch.float32)
        bad = [0, 59]  # the first and the last, which is where those of empty slots would be looked up
        x[bad], gates[bad] = torch.nan, torch.nan
        y = kernels.forward(Operands(s, factors, x, bias, Routing(indices, gates)), False)[0]
        assert y.isnan().all(1).nonzero().flatten().tolist() == bad
        assert y.isnan().any(1).nonzero().flatten().tolist() == bad
        _, grad_gates, grads = kernels.backward(
            Operands(s, factors, x, None, Routing(indices, gates)), grad, [], True, [True, True]
        )
        assert grad_gates is not None
        assert grad_gates.isnan().nonzero()[:, 0].tolist() == bad
        for of_factor in grads:
            assert of_factor is not None
            spoilt = of_factor.flatten(1).isnan().any(1).nonzero().flatten().tolist()
            assert spoilt == sorted({*indices[bad].flatten().tolist()})
            assert len(spoilt) < 5

    def test_no_tokens_and_any_strides(self) -> None:
        s, factors, indices, x, gates, bias, grad = self.draw("btt", (16, 16), 20, 2, "random", torch.float32)
        assert kernels.forward(Operands(s, factors, x[:0], bias, Routing(indices[:0], gates[:0])), False)[0].shape == (
            0,
            16,
        )
        nothing = kernels.backward(
            Operands(s, factors, x[:0], None, Routing(indices[:0], gates[:0])), grad[:0], [], True, [True, True]
        )
        assert [tuple(t.shape) for t in nothing[:2] if t is not None] == [(0, 16), (0, 2)]
        assert not any(t is None or t.any() for t in nothing[2])
        exact = self.by_reference(s, double(factors), indices, *double((x, gates, bias, grad)))
        x, grad, indices, gates = (t.T.contiguous().T for t in (x, grad, indices, gates))
        factors = [factor.transpose(0, -1).contiguous().transpose(0, -1) for factor in factors]
        y = kernels.forward(Operands(s, factors, x, bias, Routing(indices, gates)), False)[0]
        found = kernels.backward(Operands(s, factors, x, None, Routing(indices, gates)), grad, [], True, [True, True])
        assert max(map(error, [y, *found[:2], *found[2]], exact)) < 2e-6

    def test_in_a_layer(self) -> None:
        torch.manual_seed(0)
        layer = el.MoELinear(16, 24, "btt", experts=4, normalize=True, device=DEVICE)
        x = torch.randn(50, 16, device=DEVICE)
        outputs = []
        for backend in ("triton", "reference"):
            with el.backend(backend):
                y = layer(x)
                outputs.append([y.detach(), *torch.autograd.grad(y.square().mean(), list(layer.parameters()))])
        assert max(map(error, *outputs)) < 2e-6
