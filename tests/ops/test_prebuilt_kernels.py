"""Kernels in wheels: which library is loaded, and that a wheel runs compiled kernels where there is no compiler."""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from einlinear.ops.cpu import kernel_library as kernels
from einlinear.ops.cpu.toolchain import NUMBERS, TARGETS, find_compiler

ROOT = Path(__file__).parents[2]
V3, V4 = (" ".join(sorted(TARGETS["x86_64"][name].features)) for name in ("x86-64-v3", "x86-64-v4"))


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of libraries that are loaded from a wheel with kernels for both targets, none of which is real."""
    names: list[str] = []
    for name in TARGETS["x86_64"]:
        (tmp_path / f"kernel-{name}-float32.so").touch()
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(kernels, "SOURCE", tmp_path / "kernel.cpp")
    monkeypatch.setattr(kernels, "build", lambda flags, dtype: Path(*flags))
    monkeypatch.setattr(kernels, "Library", lambda path, origin: names.append(path.name) or origin)
    kernels.load.cache_clear()
    yield names
    kernels.load.cache_clear()


@pytest.mark.parametrize(
    ("features", "choice", "library", "origin"),
    [
        (V4, "", "kernel-x86-64-v4-float32.so", "prebuilt for x86-64-v4"),
        (V3, "", "kernel-x86-64-v3-float32.so", "prebuilt for x86-64-v3"),
        (V4, "x86-64-v3", "kernel-x86-64-v3-float32.so", "prebuilt for x86-64-v3"),
        (V4, "compile", "-march=native", "compiled for this machine"),
        ("sse2", "", "-march=native", "compiled for this machine"),
    ],
)
def test_the_best_library_for_the_processor_is_loaded(
    features: str, choice: str, library: str, origin: str, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_processor", lambda: f"flags\t\t: fpu {features} sse")
    monkeypatch.setenv("EINLINEAR_KERNELS", choice)
    assert kernels.load(torch.float32) == origin
    assert loaded == [library]


def test_a_target_is_compiled_where_it_is_not_prebuilt(loaded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an editable installation."""
    kernels.SOURCE.with_name("kernel-x86-64-v3-float32.so").unlink()
    monkeypatch.setattr(kernels, "_processor", lambda: V4)
    monkeypatch.setenv("EINLINEAR_KERNELS", "x86-64-v3")
    assert kernels.load(torch.float32) == "compiled for x86-64-v3"
    assert loaded == ["-march=x86-64-v3"]


@pytest.mark.parametrize(
    ("choice", "why"),
    [
        ("x86-64-v4", "EINLINEAR_KERNELS=x86-64-v4, but this processor lacks avx512bw, avx512cd"),
        ("avx2", "EINLINEAR_KERNELS='avx2' is unknown: choose 0, compile, x86-64-v4, x86-64-v3"),
    ],
)
def test_other_choices_are_refused(
    choice: str, why: str, loaded: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "_processor", lambda: V3)
    monkeypatch.setenv("EINLINEAR_KERNELS", choice)
    refusal = kernels.load(torch.float32)
    assert isinstance(refusal, str)
    assert refusal.startswith(why)
    assert refusal in caplog.text
    assert not loaded


# Compiles kernels of float32, which run here; those of other dtypes are checked and left empty, in a third of the time.
COMPILER = """#!/bin/sh
case "$*" in
*=float\\ *) exec {compiler} "$@" ;;
*) for output; do :; done; : > "$output"; exec {compiler} "$@" -fsyntax-only ;;
esac
"""


def build_wheel(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Build the wheel as pip does, without optimisation, which would take a minute."""
    if importlib.util.find_spec("hatchling") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("the tests need hatchling")
        pytest.skip("no hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    environment = {**os.environ, "CXXFLAGS": "-O0", **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of packages with the wheel of this checkout."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        pytest.skip("wheels of other systems are tested where they are built")
    try:
        compiler = find_compiler()
    except RuntimeError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))
    script = tmp_path / "compiler"
    script.write_text(COMPILER.format(compiler=shlex.join(compiler)))
    script.chmod(0o755)
    run = build_wheel(tmp_path, CXX=str(script))
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name).name for name in archive.namelist() if name.endswith(".so")}
        assert names == {f"kernel-{target}-{dtype}.so" for target in TARGETS["x86_64"] for dtype in NUMBERS}
        archive.extractall(tmp_path / "site")
    return tmp_path / "site"


PROGRAM = """
import os, sys, torch, einlinear as el
from einlinear.ops.cpu import cpu_backend
cpu_backend.PARALLEL_MACS = 0
torch.set_num_threads(3)
running = lambda: len(os.listdir("/proc/self/task"))
layer, x, before = el.Linear(60, 96, "btt(rank=2)"), torch.randn(50, 60), running()
assert el.__file__.startswith(sys.argv[1]), el.__file__
with el.backend("cpu"):
    y = layer(x)
    assert running() == before + 2, "the kernels run on three threads"
    print(el.explain(layer, x).kernels)
torch.ones(1 << 20).exp()
assert running() == before + 2, "which are those of torch"
torch.testing.assert_close(y, x @ layer.dense_weight().T + layer.bias)
"""


@pytest.mark.slow
def test_a_wheel_needs_no_compiler(site: Path, tmp_path: Path) -> None:
    features = kernels._processor().split()
    fitting = [name for name, target in TARGETS["x86_64"].items() if target.features <= {*features}]
    if "x86-64-v3" not in fitting:
        pytest.skip("the processor has no AVX2")
    home = tmp_path / "home"
    home.mkdir()
    for choice, expected in (("", fitting[0]), ("x86-64-v3", "x86-64-v3")):
        environment = {"PATH": str(home), "HOME": str(home), "PYTHONPATH": str(site), "EINLINEAR_KERNELS": choice}
        command = [sys.executable, "-c", PROGRAM, str(site)]
        run = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip() == f"prebuilt for {expected}"
    assert not list(home.iterdir()), "nothing is compiled"


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in TARGETS, reason="wheels of such machines are pure Python")
def test_without_a_compiler_a_wheel_is_pure_python(tmp_path: Path) -> None:
    run = build_wheel(tmp_path, CXX="/no/such/compiler", CI="false")
    assert run.returncode == 0, run.stderr
    assert "The wheel has no compiled kernels" in run.stdout + run.stderr
    assert [wheel.name.endswith("-py3-none-any.whl") for wheel in tmp_path.iterdir()] == [True]
    refused = build_wheel(tmp_path, CXX="/no/such/compiler", CI="true")
    assert refused.returncode != 0
    assert "/no/such/compiler" in refused.stderr
