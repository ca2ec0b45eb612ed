"""The compiled kernel on several threads: the reference's numbers, whatever is asked for and however work is divided.

``EINLINEAR_DRAWS=10000 pytest tests/ops/test_threads.py -k random`` runs that many backward passes of random sums on
each number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import product
from random import Random

import pytest
import torch
from tests.families import PATTERNS, SAMPLES, structures
from tests.random_patterns import random_structure
from torch import Tensor

import einlinear as el
from einlinear import ops
from einlinear.ops.cpu import cpu_backend
from einlinear.ops.operands import Operands
from einlinear.structures import Structure

README = "(g a), g r a, g e r -> (g e) + (b k), d k, o b -> (o d) where g=4, r=2"
SPECS = [spec for specs in SAMPLES.values() for spec in specs] + PATTERNS + [README]
# around the 8, 16, 32, 64 and 128 tokens of a vector and of a tile, in float64 and float32
TOKENS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300)
DRAWS = int(os.environ.get("EINLINEAR_DRAWS") or 400)
SUMS = 200


@pytest.fixture(params=[1, 2, 3, 8])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Threads that share even the smallest call."""
    why = ops.reason_unsupported("cpu", el.structure("dense", 2, 2), torch.float64, "cpu")
    if why is not None:
        pytest.skip(why)  # where CI=true, test_cpu.py fails
    monkeypatch.setattr(cpu_backend, "PARALLEL_MACS", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Case:
    """A structure with inputs, and what its output and gradients are according to the reference."""

    def __init__(self, structure: Structure, tokens: int, dtype: torch.dtype = torch.float64) -> None:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64)

        self.structure, self.dtype = structure, dtype
        self.x, self.bias = draw(tokens, structure.in_features), draw(structure.out_features)
        self.factors = [draw(*factor.shape) / factor.fan_in**0.5 for factor in structure.factors]
        inputs = [t.requires_grad_() for t in (self.x, *self.factors)]
        y = ops.linear(structure, self.factors, self.x, self.bias, "reference")
        self.grad = torch.randn_like(y)
        grads = torch.autograd.grad(y, inputs, self.grad)
        self.expected, self.y = [g.to(dtype) for g in grads], y.detach().to(dtype)
        self.x, self.bias, self.grad = (t.detach().to(dtype) for t in (self.x, self.bias, self.grad))
        self.factors = [factor.detach().to(dtype) for factor in self.factors]

    def check_forward(self, save: bool) -> list[Tensor]:
        y, saved = cpu_backend.forward(Operands(self.structure, self.factors, self.x, self.bias), save)
        self._equal(y, self.y, "the output")
        return saved

    def check_backward(self, saved: Sequence[Tensor], wanted: Sequence[bool]) -> None:
        """The gradients of x and of the factors, those that are wanted."""
        needs_x, *needs_factors = wanted
        product = Operands(self.structure, self.factors, self.x)
        grad_x, _, grads = cpu_backend.backward(product, self.grad, saved, needs_x, needs_factors)
        for i, (found, expected) in enumerate(zip((grad_x, *grads), self.expected, strict=True)):
            assert (found is not None) == wanted[i]
            if found is not None:
                self._equal(found, expected, f"gradient {i} of {wanted}")

    def _equal(self, found: Tensor, expected: Tensor, what: str) -> None:
        close = 1e-11 if self.dtype == torch.float64 else 1e-4
        error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
        assert error < close, f"{what} is wrong by {error:.2g}: {len(self.x)} tokens of {self.structure}"


def subsets(structure: Structure) -> list[tuple[bool, ...]]:
    """Every choice of x and the factors."""
    return list(product((False, True), repeat=1 + len(structure.factors)))


@pytest.mark.parametrize("spec", SPECS)
def test_every_subset_of_gradients(spec: str, threads: int) -> None:
    structure = structures(spec, [(24, 36), (32, 48), (48, 48)])[0]
    for tokens in (5, 40):  # less than a tile and more
        case = Case(structure, tokens)
        for save in (False, True):
            saved = case.check_forward(save)
            for wanted in subsets(structure):
                case.check_backward(saved, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_numbers_of_tokens_around_the_size_of_tiles(spec: str, threads: int) -> None:
    for size in ((24, 36), (48, 48)):
        for structure in structures(spec, [size, (48, 48)])[:1]:
            for tokens in TOKENS:
                case = Case(structure, tokens, torch.float32 if tokens % 2 else torch.float64)
                saved = case.check_forward(save=tokens % 3 == 0)
                factors = [True] * len(structure.factors)
                case.check_backward(saved, [False, *factors])
                case.check_backward(saved, [True, *factors])


@pytest.mark.slow
def test_random_sums(threads: int) -> None:
    """Many backward passes of sums of random terms, with random subsets of gradients."""
    random = Random(threads)
    for i in range(SUMS if threads > 1 else 20):
        case = Case(random_structure(i), random.choice(TOKENS), random.choice((torch.float32, torch.float64)))
        saved = case.check_forward(save=random.random() < 0.5)
        choices = subsets(case.structure)
        for _ in range(max(1, DRAWS // SUMS)):
            # a gradient of x hides some mistakes and shows others
            case.check_backward(saved, random.choice(choices))


@pytest.mark.parametrize("tokens", [8, 32])
def test_a_layer_whose_input_needs_no_gradient(tokens: int, threads: int) -> None:
    """As the first layer of any model, at its real size."""
    layer, x = el.Linear(768, 768, README), torch.randn(tokens, 768)
    with el.backend("reference"):
        expected = torch.autograd.grad(layer(x).square().sum(), layer.factors())
    for _ in range(25):
        with el.backend("cpu"):
            found = torch.autograd.grad(layer(x).square().sum(), layer.factors())
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
