"""The compiled kernel under the compiler's sanitizers: no data race, no access out of bounds, no undefined behaviour.

``EINLINEAR_DRAWS=1000 pytest tests/ops/test_sanitizers.py`` runs that many random structures.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.families import PATTERNS, SAMPLES, structures
from tests.random_patterns import random_structure

from einlinear.ops.cpu import kernel_library
from einlinear.ops.cpu.cpu_backend import program_of
from einlinear.structures import Structure

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).with_name("sanitized_kernel.cpp")
DRAWS = int(os.environ.get("EINLINEAR_DRAWS") or 8)
# Threads share work alike in all types: a float and a bfloat16 are enough there. Checks of addresses take a minute to
# optimise, which saves ten seconds.
SANITIZERS = {
    "threads": ("-fsanitize=thread", "-O1", "-DTYPES=2"),
    "addresses": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0"),
}


def compiled(folder: Path, flags: Sequence[str], source: Path = kernel_library.SOURCE) -> Path:
    """The kernel as a program, with threads that sanitizers understand."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        if os.environ.get("CI") == "true":
            pytest.fail("the tests need a C++ compiler with sanitizers")
        pytest.skip("no C++ compiler")
    program = folder / "sanitized_kernel"
    machine = ("-march=native", "-std=c++17", "-g1", "-pthread")
    command = [compiler, *machine, *flags, f"-I{source.parent}", str(SOURCE), "-o", str(program)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode and "cannot find" in run.stderr and os.environ.get("CI") != "true":
        pytest.skip(f"{compiler} has no {flags[0]}")
    assert run.returncode == 0, run.stderr
    return program


def run(program: Path, drawn: Sequence[Structure]) -> subprocess.CompletedProcess[str]:
    numbers = program.with_name("programs")
    with numbers.open("wb") as file:
        for i, structure in enumerate(drawn):
            # of every eight, factors of the last four are matrices
            matrices = range(len(structure.factors)) if i % 8 >= 4 else ()
            array = program_of(structure, frozenset(matrices))._numbers
            file.write(bytes(ctypes.c_int64(len(array))) + bytes(array))
    # ThreadSanitizer wants its memory where some kernels put other things
    fixed = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []
    return subprocess.run([*fixed, str(program), str(numbers)], capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("kind", SANITIZERS)
def test_every_entry_point_is_clean(kind: str, tmp_path: Path) -> None:
    drawn = [s for spec in [spec for specs in SAMPLES.values() for spec in specs] + PATTERNS for s in _small(spec)]
    drawn += [random_structure(i) for i in range(DRAWS)]
    result = run(compiled(tmp_path, SANITIZERS[kind]), drawn)
    assert result.returncode == 0, result.stderr[:5000]
    assert result.stdout == f"{len(drawn)} programs\n"


def _small(spec: str) -> list[Structure]:
    return structures(spec, [(15, 20), (16, 16), (17, 36)])[:1]


def test_a_missing_barrier_is_found(tmp_path: Path) -> None:
    """The kind of mistake that the suite is for, made on purpose."""
    broken = Path(shutil.copytree(kernel_library.SOURCE.parent, tmp_path / "broken"))
    team = broken / "team.h"
    assert "if (size_ > 1) Threads::barrier();" in team.read_text()
    team.write_text(team.read_text().replace("if (size_ > 1) Threads::barrier();", ""))
    flags = ("-fsanitize=thread", "-O0", "-DTYPES=1")
    result = run(compiled(tmp_path, flags, broken / kernel_library.SOURCE.name), [random_structure(1)])
    assert result.returncode != 0
    assert "data race" in result.stderr


def test_a_phase_within_a_phase_is_found(tmp_path: Path) -> None:
    broken = Path(shutil.copytree(kernel_library.SOURCE.parent, tmp_path / "broken"))
    kernel = broken / kernel_library.SOURCE.name
    divided = "work(i, Team::alone(), i == first);"
    assert divided in kernel.read_text()
    kernel.write_text(kernel.read_text().replace(divided, "work(i, all, i == first);"))
    result = run(compiled(tmp_path, ("-O0", "-DTYPES=1"), kernel), [random_structure(1)])
    assert result.returncode != 0
    assert "within a phase" in result.stderr
