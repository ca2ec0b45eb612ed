"""The compiled CPU executor: tiles of tokens that stay in cache (tiles.cpp), built on demand with the user's compiler.

The kernel knows no structure. It gets a program: for every contraction step the sizes of its matrix products, and
tables that say where their rows lie. One C++ file and a C interface, so it is compiled within seconds, once per
machine, and works with every version of torch. Without a compiler the other executors do its work.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import logging
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from einlinear.structures import Structure
from einlinear.structures.pattern import Axes

logger = logging.getLogger("einlinear")

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared")
_THREADS = ("-fopenmp",), ()  # tried in turn: without OpenMP the kernels run on one thread
_DTYPES = {torch.float32: "float32", torch.float64: "float64"}


def unsupported(structure: Structure, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why this executor cannot run, or None if it can."""
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    if dtype not in _DTYPES:
        return f"it computes in float32 and float64, not in {str(dtype).removeprefix('torch.')}"
    library = load()
    return library if isinstance(library, str) else None


def forward(
    structure: Structure, factors: Sequence[Tensor], x: Tensor, bias: Tensor | None, save: bool
) -> tuple[Tensor, list[Tensor]]:
    """y = x W^T + bias for x of shape (n, in_features), and the intermediate states if they are to be saved."""
    program, x = _program(structure), x.contiguous()
    held = [factor.contiguous() for factor in factors]
    bias = None if bias is None else bias.contiguous()
    n = x.shape[0]
    y = x.new_empty(n, structure.out_features)
    saved = []
    if save and program.state_rows:
        tile: int = _function("tile", x.dtype)(program.address, n)
        saved = [x.new_empty(-(-n // tile) * tile * program.state_rows)]
    if n:
        _function("forward", x.dtype)(
            program.address,
            program.pointers(*(factor.data_ptr() for factor in held)),
            x.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            saved[0].data_ptr() if saved else None,
            n,
            _threads(structure.macs * n),
        )
    return y, saved


def backward(
    structure: Structure,
    factors: Sequence[Tensor],
    x: Tensor,
    grad: Tensor,
    saved: Sequence[Tensor],
    needs_x: bool,
    needs_factors: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of x and of the factors, those that are needed; without saved states these are computed again."""
    program, x, grad = _program(structure), x.contiguous(), grad.contiguous()
    held = [factor.contiguous() for factor in factors]
    grad_x = torch.empty_like(x) if needs_x else None
    fresh = torch.empty_like if x.shape[0] else torch.zeros_like
    grad_factors = [fresh(factor) if wanted else None for factor, wanted in zip(held, needs_factors, strict=True)]
    if x.shape[0]:
        _function("backward", x.dtype)(
            program.address,
            program.pointers(*(factor.data_ptr() for factor in held)),
            x.data_ptr(),
            grad.data_ptr(),
            saved[0].data_ptr() if saved else None,
            None if grad_x is None else grad_x.data_ptr(),
            program.pointers(*(None if g is None else g.data_ptr() for g in grad_factors)),
            x.shape[0],
            _threads(structure.macs * x.shape[0]),
        )
    return grad_x, grad_factors


def _threads(macs: int) -> int:
    """More than one only where starting them is worth it: that takes about as long as 100,000 MACs."""
    return torch.get_num_threads() if macs > 300_000 else 1


class _Program:
    """A structure as the kernel reads it: `Program` in tiles.cpp says how the numbers are arranged."""

    def __init__(self, structure: Structure) -> None:
        self._sizes = dict(structure.sizes)
        self.pointers = ctypes.c_void_p * len(structure.factors)
        self.state_rows = 0  # of all intermediate states
        numbers = [len(structure.terms), structure.in_features, structure.out_features]
        position = itertools.count()
        for term in structure.terms:
            numbers.append(len(term.factors))
            before = term.inputs
            for factor, following in zip(term.factors, (*term.factors[1:], None), strict=True):
                # groups in the factor's own order, so that it is read in large pieces
                batch, inner = (tuple(a for a in factor.axes if a in group) for group in (factor.batch, factor.summed))
                rows = factor.introduced
                columns = tuple(a for a in before if a not in factor.axes)
                after = term.outputs
                if following is not None:  # laid out as the next step reads it
                    state = [a for a in before if a not in factor.summed] + list(rows)
                    after = (
                        *(a for a in following.axes if a in following.batch),
                        *(a for a in state if a not in following.axes),
                        *(a for a in following.axes if a in following.summed),
                    )
                    self.state_rows += self._size(after)
                groups = (batch, columns, rows, inner)
                numbers += [next(position), *map(self._size, groups), self._size(before), self._size(after)]
                tables = [
                    self._offsets(group, layout)
                    for layout, of in (
                        (before, (batch, columns, inner)),
                        (after, (batch, columns, rows)),
                        (factor.axes, (batch, rows, inner)),
                    )
                    for group in of
                ]
                numbers += [_stride(tables[i]) for i in (2, 5, 7, 8)]
                numbers += itertools.chain(*tables)
                before = after
        self._numbers = (ctypes.c_int64 * len(numbers))(*numbers)
        self.address = ctypes.addressof(self._numbers)

    def _size(self, axes: Axes) -> int:
        return math.prod(self._sizes[axis] for axis in axes)

    def _offsets(self, group: Axes, layout: Axes) -> list[int]:
        """Where the entries of a group of axes lie in row-major memory of this layout."""
        offsets = [0]
        for axis in group:
            stride = self._size(layout[layout.index(axis) + 1 :])
            offsets = [start + stride * i for start in offsets for i in range(self._sizes[axis])]
        return offsets


def _stride(offsets: Sequence[int]) -> int:
    """What lies between two neighbours, or 0 where that is not always the same."""
    stride = offsets[1] if len(offsets) > 1 else 1
    return stride if all(offset == i * stride for i, offset in enumerate(offsets)) else 0


@lru_cache(maxsize=4096)
def _program(structure: Structure) -> _Program:
    return _Program(structure)


class _Library:
    """The compiled kernels, one for every dtype, as functions of raw pointers."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        pointer, count, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self.functions = {}
        for dtype, name in _DTYPES.items():
            for role, pointers in (("forward", 6), ("backward", 7)):
                function = library[f"{name}_{role}"]
                function.argtypes, function.restype = [*[pointer] * pointers, count, threads], None
                self.functions[role, dtype] = function
            function = library[f"{name}_tile"]
            function.argtypes, function.restype = [pointer, count], count
            self.functions["tile", dtype] = function


def _function(role: str, dtype: torch.dtype) -> ctypes._NamedFuncPointer:
    library = load()
    assert isinstance(library, _Library), "the dispatcher asks `unsupported` first"
    return library.functions[role, dtype]


@lru_cache(maxsize=1)
def load() -> _Library | str:
    """The kernels, compiled if this machine has not done so yet; or why there are none."""
    try:
        return _Library(build(("-march=native",)))
    except (OSError, RuntimeError) as error:
        logger.warning("einlinear runs without its compiled CPU kernels, which is slower: %s", error)
        return str(error)


def build(machine_flags: Sequence[str]) -> Path:
    """Compile the kernels into $EINLINEAR_CACHE (by default ~/.cache/einlinear), or find what was compiled before.

    Raises:
        RuntimeError: no compiler ($CXX, c++, g++ or clang++), or it fails; the message says what it said.
        OSError: the folder cannot be written.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler found; install g++ or clang++, or name one in $CXX")
    source = SOURCE.read_bytes()
    key = hashlib.sha256(source + repr((compiler, *FLAGS, *machine_flags, _processor())).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("EINLINEAR_CACHE") or "~/.cache/einlinear").expanduser() / "kernels"
    path = folder / f"tiles-{key}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    logger.info("Compiling the CPU kernels, once: %s", path)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        said = ""
        for threads in _THREADS:
            made = Path(scratch) / "tiles.so"
            command = [compiler, *FLAGS, *machine_flags, *threads, str(SOURCE), "-o", str(made)]
            try:
                run = subprocess.run(command, capture_output=True, text=True, timeout=300)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise RuntimeError(f"the compiler {compiler!r} failed: {error}") from error
            if run.returncode == 0:
                made.replace(path)  # in one step, so that no other process sees half of it
                return path
            lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
            said = said or next((line for line in lines if "error" in line), lines[0])
    raise RuntimeError(f"{compiler!r} does not compile {SOURCE.name}: {said}")


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"
