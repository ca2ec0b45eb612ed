"""The machine of the measurements: its description, and its measured peak speeds."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch

from einlinear.ops.cost_model import processor_model
from einlinear.version import __version__, code_digest
from einlinear_lab.bench.cases import DTYPES
from einlinear_lab.bench.timing import seconds

_ENVIRONMENT = ("OMP_", "GOMP_", "KMP_AFFINITY", "KMP_BLOCKTIME", "MKL_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
# a larger matmul is tried if it takes about as long at most
_MATMUL_SECONDS = 0.1


@dataclass(frozen=True)
class Machine:
    """A machine and its software. Times are comparable if they are equal."""

    cpu: str
    # empty where the device is the CPU
    gpu: str
    system: str
    cores: int
    threads: int
    python: str
    torch: str
    einlinear: str
    # digest of the sources that run a layer, which change between releases
    code: str
    # variables that change the behaviour of threads or memory
    environment: tuple[str, ...]

    def __str__(self) -> str:
        gpu = f"{self.gpu}, " if self.gpu else ""
        environment = f", {' '.join(self.environment)}" if self.environment else ""
        return (
            f"{gpu}{self.cpu}, {self.cores} cores, {self.threads} threads, {self.system}, Python {self.python}, "
            f"torch {self.torch}, einlinear {self.einlinear} ({self.code}){environment}"
        )


def this_machine(device: str) -> Machine:
    gpu = ""
    if device == "cuda":
        properties = torch.cuda.get_device_properties()
        gpu = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return Machine(
        cpu=f"{processor_model()}, {torch.backends.cpu.get_cpu_capability()}",
        gpu=gpu,
        system=f"{platform.system()} {platform.machine()}",
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        einlinear=__version__,
        code=code_digest("einlinear/structures", "einlinear/ops", "einlinear/nn"),
        environment=tuple(f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(_ENVIRONMENT)),
    )


@dataclass(frozen=True)
class Roofline:
    """The peak speeds: operations per second of a large matmul, bytes per second of a large copy."""

    flops: float
    bandwidth: float

    def seconds(self, flops: float, moved: float) -> float:
        """Return the least time for so many operations and bytes: the slower of the two decides."""
        return max(flops / self.flops, moved / self.bandwidth)


@torch.no_grad()
def measure_roofline(dtype: str, device: str) -> Roofline:
    """Measure the peak speeds, in a second on a CPU."""
    n, largest, copied = (8192, 8192, 2**31) if device == "cuda" else (256, 2048, 2**28)
    flops = _matmul_speed(n, dtype, device)
    # not every processor has fast arithmetic in half precision: a matmul of 2048 could take a minute
    while n < largest and 16 * n**3 < flops * _MATMUL_SECONDS:
        n *= 2
        flops = max(flops, _matmul_speed(n, dtype, device))
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return Roofline(flops, 2 * copied / min(seconds(lambda: target.copy_(source), device) for _ in range(5)))


def _matmul_speed(n: int, dtype: str, device: str) -> float:
    a, b = (torch.randn(n, n, dtype=DTYPES[dtype], device=device) for _ in range(2))
    product = torch.empty_like(a)
    return 2 * n**3 / min(seconds(lambda: torch.mm(a, b, out=product), device) for _ in range(5))
