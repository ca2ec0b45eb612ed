"""The compiled CPU kernel: that it is there, compiles for other processors, and is replaced where it cannot be."""

from __future__ import annotations

import os
import platform
import re
import shutil
from pathlib import Path

import pytest
import torch

import einlinear as el
from einlinear import ops
from einlinear.ops import cost_model, dispatch
from einlinear.ops.cpu import cpu_backend
from einlinear.ops.cpu import kernel_library as kernels
from einlinear.ops.cpu.cpu_backend import program_of


@pytest.fixture
def fresh() -> object:
    """Forget what was compiled and chosen, before and after."""

    def forget() -> None:
        kernels.load.cache_clear()
        dispatch.forget()

    forget()
    yield forget
    forget()


def test_it_is_compiled_where_tests_have_to_be_complete() -> None:
    why = ops.reason_unsupported("cpu", el.structure("btt", 16, 16), torch.float32, "cpu")
    if os.environ.get("CI") != "true" and why is not None:
        pytest.skip(why)
    assert why is None


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of x86")
@pytest.mark.parametrize("flags", [("-msse4.2",), ("-mavx2", "-mfma")])
def test_other_vector_widths(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, fresh: object) -> None:
    build = kernels.build
    # half the time of -O3, which the processor's own widths are compiled with
    monkeypatch.setattr(kernels, "build", lambda native, dtype: build((*flags, "-O1"), dtype))
    for spec in ("btt(rank=2)", "dyad", "btt(cores=3)"):
        for tokens in (1, 7, 50):
            for dtype, close in ((torch.float64, 1e-11), (torch.float32, 1e-3)):
                layer = el.Linear(60, 96, spec, dtype=dtype)
                x = torch.randn(tokens, 60, dtype=dtype, requires_grad=True)
                inputs = [x, *layer.parameters()]
                expected = x @ layer.dense_weight().T + layer.bias
                with el.backend("cpu"):
                    y = layer(x)
                    found = torch.autograd.grad(y.square().sum(), inputs)
                torch.testing.assert_close(y, expected, rtol=0, atol=close)
                for a, b in zip(found, torch.autograd.grad(expected.square().sum(), inputs), strict=True):
                    torch.testing.assert_close(a, b, rtol=close, atol=close * 10)


@pytest.mark.parametrize("spec", ["low_rank(rank=256)", "dyad(blocks=2)", "monarch(blocks=2)"])
@pytest.mark.parametrize("recompute", [True, False])
def test_large_factors_have_larger_tiles(spec: str, recompute: bool) -> None:
    layer = el.Linear(1024, 1000, spec, dtype=torch.float64)
    x = torch.randn(300, 1024, dtype=torch.float64, requires_grad=True)
    tile, own = cpu_backend.library_for(x).tile, program_of(layer.structure)
    assert tile(own.address, 300) > tile(program_of(el.structure("btt", 1024, 1000)).address, 300)
    inputs = [x, *layer.parameters()]
    expected = x @ layer.dense_weight().T + layer.bias
    grad = torch.randn_like(expected)
    with el.backend("cpu", recompute=recompute):
        y = layer(x)
        found = torch.autograd.grad(y, inputs, grad)
    torch.testing.assert_close(y, expected)
    for a, b in zip(found, torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_without_openmp(monkeypatch: pytest.MonkeyPatch, fresh: object) -> None:
    """Fewer threads run than are asked for, which has to leave no memory unwritten."""
    monkeypatch.setattr(kernels, "_find_openmp", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        layer, x = el.Linear(60, 96, "btt(rank=2)", dtype=torch.float64), torch.randn(3000, 60, dtype=torch.float64)
        with el.backend("cpu"):
            found = torch.autograd.grad(layer(x).square().sum(), layer.factors())
    finally:
        torch.set_num_threads(before)
    expected = torch.autograd.grad((x @ layer.dense_weight().T + layer.bias).square().sum(), layer.factors())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false"])
def test_without_a_compiler_others_do_the_work(
    compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh: object, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("EINLINEAR_CACHE", str(tmp_path))
    layer, x = el.Linear(64, 64, "btt"), torch.randn(40, 64)
    chosen = el.explain(layer, x)
    assert chosen.backend in ("batched", "reference")
    assert compiler in dict(chosen.refusals)["cpu"]
    assert compiler in caplog.text
    torch.testing.assert_close(layer(x), x @ layer.dense_weight().T + layer.bias)
    with pytest.raises(RuntimeError, match="cannot run here"), el.backend("cpu"):
        layer(x)


@pytest.mark.slow
def test_compiled_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EINLINEAR_CACHE", str(tmp_path))
    path = kernels.build(("-O0",), "float32")
    assert path.parent == tmp_path / "kernels"
    made = path.stat().st_mtime_ns
    assert kernels.build(("-O0",), "float32") == path
    assert path.stat().st_mtime_ns == made
    assert {p.name for p in path.parent.iterdir()} == {path.name, ".lock"}, "nothing else is left behind"
    changed = Path(shutil.copytree(kernels.SOURCE.parent, tmp_path / "changed"))
    (changed / "decode.h").write_text((changed / "decode.h").read_text() + "// more\n")
    monkeypatch.setattr(kernels, "SOURCE", changed / kernels.SOURCE.name)
    assert kernels.build(("-O0",), "float32") != path


def test_the_cost_model_presumes_the_cache_that_the_kernel_does() -> None:
    (exponent,) = re.findall(r"HEAVY_ENTRIES = 1 << (\d+)", (kernels.SOURCE.parent / "program.h").read_text())
    assert 2 ** int(exponent) == cost_model.CACHED
