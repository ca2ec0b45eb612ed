"""Fused feed-forward blocks in the Triton kernels against float64, without a GPU in Triton's interpreter.

As test_triton.py, this file runs itself once more, in a process that has TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lab.data.samples import needs
from tests.ops.test_triton import DEVICE, ERROR, INTERPRETED, RUNS, error, poison, quick_arithmetic, untuned
from torch import Tensor

import einlinear as el
from einlinear import ops
from einlinear.ops import feed_forward_structure, fused_dispatch
from einlinear.ops.operands import Operands
from einlinear.ops.triton import chunked_block, triton_backend
from einlinear.ops.triton.launch import Epilogue

pytestmark = [needs("triton"), pytest.mark.slow]
__all__ = ["poison", "quick_arithmetic", "untuned"]

# structures of up, gate and down; features, hidden features, tokens, dtype, activation, bias, residual
CASES: list[tuple[tuple[str, ...], tuple[int, int], int, torch.dtype, str, bool, bool]] = [
    (("btt", "btt"), (4, 4), 17, torch.float32, "gelu", True, True),
    (("btt(rank=2)", "btt(rank=2)"), (4, 4), 17, torch.bfloat16, "silu", False, False),
    (("monarch(blocks=2)",) * 3, (4, 4), 17, torch.float32, "silu", True, True),
    (("low_rank(rank=2)",) * 3, (5, 7), 18, torch.bfloat16, "gelu_tanh", True, True),
    (("dense",) * 3, (7, 5), 40, torch.float32, "sigmoid", False, False),
    (("low_rank(rank=2)", "dyad(blocks=2)", "dyad(blocks=2)"), (4, 6), 17, torch.float32, "tanh", True, True),
]
NUMBERS = [
    torch.nan,
    torch.inf,
    0.0,
    1e30,
    -1e30,
    1e4,
    -1e4,
    30.0,
    -30.0,
    9.0,
    -6.0,
    0.2,
    0.12,
    -0.12501,
    1e-3,
    -1e-30,
]


@pytest.mark.skipif(RUNS, reason="the tests run here")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::TestBlocks"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


class Block:
    """A block with its input and the gradient of its output."""

    def __init__(
        self,
        specs: Sequence[str] = ("dense", "dense"),
        sizes: tuple[int, int] = (5, 4),
        tokens: int = 20,
        dtype: torch.dtype = torch.float32,
        activation: str = "gelu",
        bias: bool = True,
        residual: bool = True,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE, dtype)

        *first, last = specs
        self.structures = [*(el.structure(spec, *sizes) for spec in first), el.structure(last, *sizes[::-1])]
        self.activation, self.residual, self.bias = activation, residual, bias
        self.tensors, self.grad = [randn(tokens, sizes[0])], randn(tokens, sizes[0])
        for s in self.structures:
            self.tensors += [randn(*f.shape) / f.fan_in**0.5 for f in s.factors] + [randn(s.out_features)] * bias

    def output(self, tensors: Sequence[Tensor], backend: str | None) -> Tensor:
        x, *rest = tensors
        layers = []
        for s in self.structures:
            factors, rest = rest[: len(s.factors)], rest[len(s.factors) :]
            layers.append(ops.Weights(s, factors, rest.pop(0) if self.bias else None))
        up, *gate, down = layers
        return ops.feed_forward(x, up, down, *gate, activation=self.activation, residual=self.residual, backend=backend)

    def run(self, backend: str | None, dtype: torch.dtype | None = None, wanted: Sequence[int] = ()) -> list[Tensor]:
        """The output, and the gradients of the tensors that are wanted: by default of all."""
        tensors = [tensor.detach().to(dtype or tensor.dtype) for tensor in self.tensors]
        leaves = [tensors[i].requires_grad_() for i in wanted or range(len(tensors))]
        y = self.output(tensors, backend)
        return [y.detach(), *torch.autograd.grad(y, leaves, self.grad.to(y.dtype))]


class TestBlocks:
    __test__ = RUNS

    @pytest.fixture(autouse=True)
    def small_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Chunks of 16 tokens."""
        monkeypatch.setattr(chunked_block, "CHUNK_BYTES", 0)
        monkeypatch.setattr(chunked_block, "_MIN_TOKENS", 16)

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case[0][-1])
    def test_output_and_gradients(self, case: tuple[Any, ...]) -> None:
        """Several chunks of tokens, the last of them ragged."""
        block, dtype = Block(*case), case[3]
        exact, theirs = block.run("reference", torch.float64), block.run("reference")
        floor = {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
        # the interpreter truncates to bfloat16 instead of rounding
        slack = 2 if INTERPRETED and dtype == torch.bfloat16 else 1
        for found, their, wanted in zip(block.run("triton"), theirs, exact, strict=True):
            assert found.dtype == dtype
            assert error(found, wanted) <= slack * ERROR * max(floor, error(their, wanted))

    @pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
    @pytest.mark.parametrize("activation", ops.ACTIVATIONS)
    def test_every_activation(self, activation: str) -> None:
        """In an epilogue, after the addend and before the multiplier; special numbers are those of torch."""
        z, s = torch.tensor([NUMBERS, NUMBERS], device=DEVICE), el.structure("i, i -> i", len(NUMBERS), len(NUMBERS))
        product = Operands(s, [torch.ones(len(NUMBERS), device=DEVICE)], torch.zeros_like(z))
        y, _ = triton_backend.compute(product, Epilogue(None, z, activation, torch.full_like(z, 2.0)))
        exact = 2 * ops.ACTIVATIONS[activation](z.double()).float()
        torch.testing.assert_close(y, exact, equal_nan=True, rtol=2e-6, atol=1e-7)

    @pytest.mark.parametrize("wanted", [[0], [1], [4], [6]], ids=["x", "up", "bias of gate", "bias of down"])
    def test_only_what_is_wanted(self, wanted: list[int]) -> None:
        block = Block(("dense",) * 3, tokens=10)
        exact = block.run("reference", torch.float64, wanted)
        _, found = block.run("triton", wanted=wanted)
        assert error(found, exact[1]) < 2e-6

    def test_no_tokens(self) -> None:
        block = Block(tokens=0)
        y, grad_x, *others = block.run("triton")
        assert y.shape == grad_x.shape == (0, 5)
        assert not any(grad.any() for grad in others)

    def test_any_strides(self) -> None:
        block = Block(("low_rank(rank=2)", "dense"))
        exact = block.run("reference", torch.float64)
        block.grad = block.grad.T.contiguous().T
        block.tensors = [
            torch.stack([t, t], -1)[..., 0].movedim(0, -1).contiguous().movedim(-1, 0) for t in block.tensors
        ]
        block.tensors[3] = torch.stack([block.tensors[3]] * 2, -1)[:, 0]
        assert not block.tensors[3].is_contiguous()
        for found, wanted in zip(block.run("triton"), exact, strict=True):
            assert error(found, wanted) < 2e-6

    def test_gradients_are_summed_in_float32(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each of the later chunks adds less than the last digit that the sum of the first one has in bfloat16."""
        block = Block(tokens=16 * 5, dtype=torch.bfloat16, activation="identity")
        block.tensors[0].fill_(1)
        block.grad[:16], block.grad[16:] = 1, 2**-9
        _, in_chunks = block.run("triton", wanted=[3])
        monkeypatch.setattr(chunked_block, "_MIN_TOKENS", 80)
        _, whole = block.run("triton", wanted=[3])
        assert error(in_chunks, whole.double()) < 2e-3

    def test_training_saves_x_and_the_weights_alone(self) -> None:
        block, saved = Block(), dict[int, int]()

        def pack(tensor: Tensor) -> Tensor:
            saved[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            block.output([tensor.requires_grad_() for tensor in block.tensors], "triton")
        assert sum(saved.values()) == sum(tensor.numel() for tensor in block.tensors)

    def test_the_operator(self) -> None:
        """As torch.compile calls it: autograd does not see inside, so backward has a formula for every activation."""
        block = Block(("dense",) * 3, activation="quick_gelu")
        x, *tensors = [tensor.requires_grad_() for tensor in block.tensors]
        arguments = [s.spec for s in block.structures], [4, 5], [True] * 3, "quick_gelu", True, "triton"
        y = torch.ops.einlinear.feed_forward(x, tensors, *arguments)
        found = [y.detach(), *torch.autograd.grad(y, [x, *tensors], block.grad)]
        for mine, wanted in zip(found, block.run("reference", torch.float64), strict=True):
            assert error(mine, wanted) < 2e-6

    def test_only_where_it_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: Any) -> Any:
            raise AssertionError("the Triton kernels ran")

        monkeypatch.setattr(chunked_block, "forward", refuse)
        block = Block()
        block.output(block.tensors, None)
        with pytest.raises(AssertionError, match="kernels ran"), el.backend("triton"):
            block.output(block.tensors, None)
        layer = el.FeedForward(8, 8, "dense", device=DEVICE)
        with el.backend("triton"):
            choice = el.explain(layer, torch.randn(20, 8, device=DEVICE))
        assert (choice.backend, choice.reason[:6]) == ("triton", "fused:")


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_every_derivative(activation: str) -> None:
    z = torch.tensor(NUMBERS[1:], dtype=torch.float64)
    z = z[z.isfinite() & (z != 0)].requires_grad_()
    grad = torch.linspace(1, 2, len(z), dtype=torch.float64)
    (exact,) = torch.autograd.grad(ops.ACTIVATIONS[activation](z), z, grad)
    torch.testing.assert_close(chunked_block._DERIVATIVES[activation](grad, z.detach()), exact, rtol=1e-9, atol=1e-12)


def test_chunks_have_hidden_features_that_fit_in_the_cache() -> None:
    def tokens(hidden: int, dtype: torch.dtype, tokens: int = 20000) -> list[int]:
        structures = el.structure("low_rank(rank=1)", 8, hidden), el.structure("low_rank(rank=1)", hidden, 8)
        block, x = (
            feed_forward_structure.FeedForwardStructure(structures, (False, False), "gelu", False),
            torch.empty(tokens, 8, dtype=dtype),
        )
        chunks = chunked_block._chunks(block, x)
        return [len(x[chunk]) for chunk in chunks]

    assert tokens(4096, torch.bfloat16) == [2048] * 9 + [20000 - 9 * 2048]
    assert tokens(5000, torch.float32)[0] * 5000 * 4 <= chunked_block.CHUNK_BYTES
    assert tokens(2**20, torch.float32, 300) == [128, 128, 44]
    assert tokens(4096, torch.float32, 0) == [0]


def test_the_default_is_layer_by_layer_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    structures, cuda = (el.structure("dense", 8, 8),) * 2, torch.device("cuda")
    supported = {"triton": None}
    monkeypatch.setattr(fused_dispatch, "reason_unsupported", lambda name, *_: supported.get(name, "not on cuda"))

    def reason(backend: str | None = None) -> str | None:
        return ops.reason_not_to_fuse(structures, 1000, torch.bfloat16, cuda, True, backend)

    assert reason() == "the backend 'cpu', which fuses blocks, cannot run: not on cuda"
    assert reason("triton") is None
    with el.backend("triton"):
        assert reason() is None
        chosen = fused_dispatch.choose_fused_for_compiler(["dense"] * 2, [8, 8, 8], torch.bfloat16, "cuda", None)
        assert chosen == "triton"
    with el.backend("triton", recompute=False):
        assert "saves them" in str(reason())
    supported["triton"] = "no triton here"  # type: ignore[assignment]
    assert reason("triton") == "the backend 'triton', which fuses blocks, cannot run: no triton here"
