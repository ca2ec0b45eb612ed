"""The Triton kernels without running them: the plan's layouts, and compilation for a Hopper GPU, which needs no GPU.

The interpreter accepts code that the compiler refuses.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.lab.data.samples import needs
from torch import Tensor

import einlinear as el
from einlinear import ops
from einlinear.ops.operands import Operands, Routing
from einlinear.ops.triton import launch
from einlinear.ops.triton import triton_backend as kernels
from einlinear.ops.triton.launch import strided_steps


class TestPlans:
    """What needs no kernel to run."""

    def test_what_is_unsupported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        s = el.structure("btt", 16, 16)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        assert "not on cpu" in str(kernels.reason_unsupported(s, torch.float32, torch.device("cpu")))
        assert "not float64" in str(kernels.reason_unsupported(s, torch.float64, torch.device("cuda")))
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert kernels.reason_unsupported(s, torch.float32, torch.device("cpu")) is None
        assert "on the CPU" in str(kernels.reason_unsupported(s, torch.float32, torch.device("cuda")))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert kernels.reason_unsupported(s, torch.float32, torch.device("cuda")) == "triton is not installed"

    def test_float32_products_are_computed_as_torch_computes_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            assert launch._precision(torch.float32) == "ieee"
            torch.set_float32_matmul_precision("high")
            assert launch._precision(torch.float32) == "tf32"
        finally:
            torch.set_float32_matmul_precision(before)

    @pytest.mark.parametrize(
        ("spec", "tokens_last"),
        [
            ("btt", True),
            ("btt(rank=32)", False),
            ("kronecker", False),
            ("low_rank(rank=64)", False),
            ("monarch", False),
        ],
    )
    def test_the_intermediate_is_reached_in_runs(self, spec: str, tokens_last: bool) -> None:
        ((first, second),) = strided_steps(el.structure(spec, 1024, 1024))
        assert first.result is second.source
        assert first.result.tokens_last is tokens_last
        if not tokens_last:
            assert first.result.fastest_axis in first.new
            assert first.result.fastest_axis in second.contracted + second.free


@needs("triton")
class TestCompiled:
    """Compilation of every kind of launch for an H100."""

    __test__ = not launch.interpreting()

    @pytest.mark.parametrize(
        ("spec", "in_features", "out_features", "dtype"),
        [
            ("btt", 1024, 4096, torch.bfloat16),
            ("monarch", 1024, 1024, torch.float16),
            ("kronecker", 1024, 1024, torch.bfloat16),
            ("low_rank(rank=32)", 1024, 1024, torch.float32),
            ("dyad(variant=dt)", 1000, 1000, torch.float32),
            ("tt(rank=3)", 1009, 331, torch.bfloat16),
        ],
    )
    def test_compiles_and_fits(
        self,
        monkeypatch: pytest.MonkeyPatch,
        spec: str,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
    ) -> None:
        launches: list[tuple[Any, ...]] = []

        def record(kernel: Any, sizes: Any, found: Any, *args: Any, **constants: Any) -> None:
            launches.append((kernel, found[0], args, constants))

        monkeypatch.setattr(launch, "_launch", record)
        s = el.structure(spec, in_features, out_features)
        factors = [torch.empty(f.shape, dtype=dtype) for f in s.factors]
        x, bias, grad = (torch.empty(n, dtype=dtype) for n in ((4096, in_features), out_features, (4096, out_features)))
        _, saved = kernels.forward(Operands(s, factors, x, bias), True)
        kernels.backward(Operands(s, factors, x), grad, saved, True, [True] * len(factors))
        routing = Routing(torch.arange(8192).view(4096, 2) % 8, torch.zeros(4096, 2, dtype=dtype))
        stacked = [torch.empty(8, *f.shape, dtype=dtype) for f in s.factors]
        kernels.forward(Operands(s, stacked, x, bias, routing), False)
        kernels.backward(Operands(s, stacked, x, None, routing), grad, [], True, [True] * len(factors))
        assert launches
        for kernel, tile, args, constants in launches:
            compiled = compile_for_hopper(kernel, tile, args, constants)
            assert compiled.metadata.shared <= launch.SHARED
            if not any(limit for name, limit in constants.items() if name.endswith("LIMIT")) and dtype.itemsize == 2:
                # neighbours are moved together
                assert ".global.b16" not in compiled.asm["ptx"]

    @pytest.mark.parametrize("activation", ops.ACTIVATIONS)
    def test_epilogues_compile(self, monkeypatch: pytest.MonkeyPatch, activation: str) -> None:
        launches: list[tuple[Any, ...]] = []

        def record(kernel: Any, sizes: Any, found: Any, *args: Any, **constants: Any) -> None:
            launches.append((kernel, found[0], args, constants))

        monkeypatch.setattr(launch, "_launch", record)
        s = el.structure("dense", 64, 256)
        x, bias, hidden = (torch.empty(n, dtype=torch.bfloat16) for n in ((128, 64), (256,), (128, 256)))
        factors = [torch.empty(shape, dtype=torch.bfloat16) for shape in s.shapes]
        kernels.compute(Operands(s, factors, x), launch.Epilogue(bias, hidden, activation, hidden))
        ((kernel, tile, args, constants),) = launches
        compiled = compile_for_hopper(kernel, tile, args, constants)
        assert compiled.metadata.shared <= launch.SHARED
        assert ".global.b16" not in compiled.asm["ptx"]


def compile_for_hopper(kernel: Any, tile: launch.Tile, args: Sequence[Any], constants: dict[str, Any]) -> Any:
    """Compile a launch as triton's launcher would: it knows which arguments are 1 and which are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}
    constants = {**constants, **dict(tile.blocks)}
    signature, aligned = {}, {}
    for position, name in enumerate(kernel.arg_names):
        value = constants.get(name, args[position] if position < len(args) else None)
        if name in constants or value is None or (isinstance(value, int) and value == 1):
            constants[name], signature[name] = value, "constexpr"
            continue
        signature[name] = names[value.dtype] if isinstance(value, Tensor) else "i32"
        if isinstance(value, Tensor) or value % 16 == 0:
            aligned[position,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, **launch.OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
