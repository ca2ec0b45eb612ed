"""How kernels are compiled, and the processors that wheels have them for.

The build of a wheel reads this file (tools/prebuilt_kernels.py), so it imports neither torch nor einlinear.
"""

import os
import shlex
import shutil
from typing import NamedTuple

FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared")
# dtypes as torch calls them, and their names in vectors.h: there is one library for each
NUMBERS = {"float32": "float", "float64": "double", "bfloat16": "BFloat16", "float16": "Float16"}


class Target(NamedTuple):
    """A kind of processor: flags of the compiler, and features that Linux reports in /proc/cpuinfo."""

    flags: tuple[str, ...]
    features: frozenset[str]


_V3 = frozenset({"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})
_V4 = _V3 | {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}
# for each `platform.machine()`, the fastest first; an Arm processor of 64 bits has all that the kernels use
TARGETS = {
    "x86_64": {"x86-64-v4": Target(("-march=x86-64-v4",), _V4), "x86-64-v3": Target(("-march=x86-64-v3",), _V3)},
    **{machine: {"armv8-a": Target(("-march=armv8-a",), frozenset())} for machine in ("aarch64", "arm64")},
}


def flag_of(dtype: str) -> str:
    """Return the flag with which the kernel is compiled for a dtype."""
    return f"-DEINLINEAR_NUMBER={NUMBERS[dtype]}"


def find_compiler() -> list[str]:
    """Return the command of the compiler: $CXX may be "ccache g++"."""
    named = os.environ.get("CXX")
    if not named:
        for compiler in filter(shutil.which, ("c++", "g++", "clang++")):
            return [compiler]
        raise RuntimeError("no C++ compiler found; install g++ or clang++, or name one in $CXX")
    if shutil.which(named):
        return [named]
    try:
        return shlex.split(named, posix=os.name == "posix")
    except ValueError as error:
        raise RuntimeError(f"CXX={named!r} is not a command: {error}") from None
