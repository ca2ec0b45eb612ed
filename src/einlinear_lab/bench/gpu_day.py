"""Run the parts of a benchmark of a GPU in limited time. `tools/gpu_day.sh` sets the environment and starts it.

Every part runs in a separate process, with a share of the remaining time. A case that fails ends its process, since
CUDA cannot be used after some errors; the part then continues with the next case in a new process. Every result is
written at once to gpu.json, with tables and a verdict in gpu.md. The same command again measures what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from einlinear.files import write_text
from einlinear.ops.triton import launch
from einlinear_lab.bench import gpu, timing
from einlinear_lab.bench.cases import DTYPES, Case
from einlinear_lab.bench.gpu import TRITON, Items, Row, Sizes
from einlinear_lab.bench.gpu_page import (
    BLOCKS,
    KERNELS,
    MIXTURES,
    SHARES,
    SUITE,
    TUNED,
    conclude,
    failed,
    page,
)
from einlinear_lab.bench.machine import this_machine
from einlinear_lab.bench.run import Reference
from einlinear_lab.bench.variants import COMPILED, FUSED, make_variants, make_workload

# the repository, which has the tests
ROOT = Path(__file__).parents[3]
TESTS = ("tests/ops/test_triton.py", "tests/ops/test_triton_blocks.py")
# exit status of a process that ends since a case failed
RESTART = 75
# the share of its time after which a part starts no further case
LAST_START = 0.85
COMPLETE = "complete"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/gpu_day.sh", description="Benchmark a GPU in limited time.")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all parts (default: 540)")
    parser.add_argument("--out", type=Path, help="folder of gpu.json, gpu.md and gpu.log")
    parser.add_argument("--rehearse", action="store_true", help="run every part on the CPU, at tiny sizes")
    parser.add_argument("--part", choices=[*SHARES, "warm"], help=argparse.SUPPRESS)
    parser.add_argument("--share", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    sizes = gpu.TINY if options.rehearse else Sizes()
    if options.budget <= 0:
        parser.error("--budget must be positive")
    if options.rehearse and not launch.interpreting():
        parser.error("set TRITON_INTERPRET=1 for a rehearsal, as tools/gpu_day.sh does")
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --rehearse runs all parts on a CPU")
    if options.rehearse:
        timing.MIN_RUNS = 1
        _skip_overflow_checks()
    if options.part == "warm":
        warm(sizes, *map(int, options.share.split("/")))
        return 0
    if options.part:
        return run_part(options.part, sizes, options.out, options.budget)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    default = Path(tempfile.mkdtemp(prefix="gpu-day-")) if options.rehearse else ROOT / "docs/benchmarks/gpu"
    return run_all(sizes, options.out or default, options.budget, options.rehearse)


def _skip_overflow_checks() -> None:
    """Let Triton's interpreter not look for overflows in sums of indices, which takes a third of its time."""
    from triton.runtime import interpreter  # type: ignore[import-not-found, import-untyped, unused-ignore]

    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def run_all(sizes: Sizes, out: Path, budget: float, rehearse: bool) -> int:
    """Run all parts that are not complete in `budget` seconds; return 1 if something failed."""
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    record, head = load(out), describe(sizes.device, rehearse)
    if any(record.get(key) != value for key, value in head.items()):
        record = {**head, "parts": {}}
    command = shlex.join(["tools/gpu_day.sh", *sys.argv[1:]])
    record |= {"date": datetime.now().astimezone().isoformat(timespec="seconds"), "command": command}
    save(record, out)
    states = record["parts"]
    todo = [part for part in SHARES if part == KERNELS or states.get(part, {}).get("status") != COMPLETE]
    flags = ["--out", str(out), *["--rehearse"] * rehearse]
    # each of these processes compiles alone: they are many
    alone = {"EINLINEAR_TUNE": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    warming = [
        start(["--part", "warm", "--share", share, *flags], out / "warm.log", **alone) for share in shares(sizes.device)
    ]
    try:
        for i, part in enumerate(todo):
            left = budget - (time.monotonic() - started)
            limit = left * SHARES[part] / sum(SHARES[later] for later in todo[i:])
            begin = time.monotonic()
            run_process(part, out, limit, flags)
            if part == KERNELS:
                # nothing else may run while times are measured
                stop(warming, limit - (time.monotonic() - begin))
            status = load(out)["parts"][part]["status"]
            print(f"{part}: {status}, {time.monotonic() - begin:.0f} s", flush=True)
    finally:
        stop(warming, 0)
    record = load(out)
    print(f"\n{conclude(record)}\n\nResults: {out / 'gpu.md'}, with gpu.json and gpu.log.")
    return int(any(failed(part) or part["status"].startswith("failed") for part in record["parts"].values()))


def describe(device: str, rehearse: bool) -> Row:
    """Return what makes results comparable: the machine and its software."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    machine = json.loads(json.dumps(asdict(this_machine(device))))
    return {"rehearsal": rehearse, "machine": machine, "driver": driver, "triton": version("triton")}


def shares(device: str) -> list[str]:
    """Return a share of the layers for each process that compiles ahead, such as "0/10"."""
    if device == "cpu":
        return ["0/1"]
    # a process needs up to 8 GB of the GPU
    memory = torch.cuda.get_device_properties().total_memory // 2**33
    count = max(1, min(cores() // 2, memory - 1))
    return [f"{i}/{count}" for i in range(count)]


def cores() -> int:
    return len(os.sched_getaffinity(0))


def start(options: Sequence[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start this module in a new process group."""
    command = [sys.executable, "-m", "einlinear_lab.bench.gpu_day", *options]
    with log.open("ab") as output:
        return subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def stop(processes: Iterable[subprocess.Popen[bytes]], patience: float) -> None:
    """Wait for processes for some seconds in all, then end them with all that they started."""
    end = time.monotonic() + patience
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
        # also if the process itself has ended: its children may run on
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_process(part: str, out: Path, limit: float, flags: Sequence[str]) -> None:
    """Run a part in processes until it is done or its time is over, and record why it ended."""
    end, log = time.monotonic() + limit, out / "gpu.log"
    with log.open("a", encoding="utf-8") as output:
        output.write(f"\n--- {part}\n")
    while (left := end - time.monotonic()) > 1:
        process = start(
            ["--part", part, "--budget", f"{left:.1f}", *flags], log, EINLINEAR_TUNE=str(int(part == TUNED))
        )
        try:
            code = process.wait(left)
        except subprocess.TimeoutExpired:
            return record_end(part, out, f"stopped at its limit of {limit:.0f} s")
        finally:
            stop([process], 0)
        if code == 0:
            return None
        if code != RESTART:
            last = " ".join(log.read_text(encoding="utf-8", errors="replace").split()[-30:])
            return record_end(part, out, f"failed with exit status {code}: … {last}")
    return record_end(part, out, f"stopped at its limit of {limit:.0f} s")


def record_end(part: str, out: Path, status: str) -> None:
    record = load(out)
    record["parts"].setdefault(part, {"results": {}, "failures": {}})["status"] = status
    save(record, out)


def run_part(part: str, sizes: Sizes, out: Path, seconds: float) -> int:
    """Measure the missing cases of a part; return RESTART after a failure."""
    end = time.monotonic() + LAST_START * seconds
    record = load(out)
    state = record["parts"].setdefault(part, {"results": {}, "failures": {}})
    state["status"] = "interrupted"
    cases = items(part, sizes, state, end)
    for name, measure in cases.items():
        if name in state["results"] or name in state["failures"]:
            continue
        done = f"{len(state['results'])} of {len(cases)} cases"
        if time.monotonic() > end:
            state["status"] = f"out of time after {done}"
            save(record, out)
            return 0
        print(name)
        try:
            state["results"][name] = measure()
        except Exception as error:
            state["failures"][name] = f"{type(error).__name__}: {error}"[:2000]
            print(state["failures"][name])
        save(record, out)
        if name in state["failures"]:
            return RESTART
    failed = len(state["failures"])
    state["status"] = f"failed in {failed} of {len(cases)} cases" if failed else COMPLETE
    save(record, out)
    return 0


def items(part: str, sizes: Sizes, state: Row, end: float) -> Items:
    """Return the cases of a part."""
    if part == KERNELS:
        missing = [package for package in ("pytest", "hypothesis", "numpy") if find_spec(package) is None]
        tests: Items = {} if missing else {f"pytest {' '.join(TESTS)}": partial(run_tests, sizes, end)}
        if missing:
            print(f"{', '.join(missing)}: not installed, so the tests cannot run; a few kernels are checked instead")
        return tests if tests and not state["failures"] else tests | check_kernels(sizes)
    if part in (SUITE, TUNED):
        return gpu.layers(sizes, compiled=part == SUITE)
    if part == BLOCKS:
        return gpu.blocks(sizes)
    return gpu.mixture_layers(sizes) if part == MIXTURES else gpu.gpts(sizes)


def run_tests(sizes: Sizes, end: float) -> Row:
    """Run the tests of the kernels, on several cores if pytest-xdist is installed. Raises RuntimeError if none runs."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-W", "default", *TESTS]
    if sizes.device == "cpu":
        command += ["-k", "output_and_gradients and (TestKernels and kronecker and float32 or TestBlocks and dense)"]
    elif find_spec("xdist"):
        command += ["-n", str(max(1, cores() // 2))]
    with tempfile.TemporaryFile("w+") as output:
        try:
            ended = subprocess.run(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=end - time.monotonic()
            )
            note = f"exit status {ended.returncode}"
        except subprocess.TimeoutExpired:
            note = "stopped by its time limit"
        output.seek(0)
        text = output.read()
    print(text)
    passed = len(re.findall(r"\bPASSED\b", text))
    failed = sorted({*re.findall(r"(?:FAILED|ERROR) (tests/\S+)|(tests/\S+) (?:FAILED|ERROR)", text)})
    if not passed and not failed and not note.startswith("stopped"):
        raise RuntimeError(f"no test ran: {note}, {text[-1000:]}")
    return {"passed": passed, "failed": ["".join(names) for names in failed], "note": note}


def check_kernels(sizes: Sizes) -> Items:
    """Compare outputs and gradients of the kernels with float64, at sizes that need masks and padding."""
    specs = ("btt", "btt(rank=2)", "monarch(blocks=2)", "low_rank(rank=5)", "dyad(blocks=4)", "tt(rank=2, cores=3)")
    cases = [Case(spec, 46, 64, 33, "train", dtype, sizes.device, bias=True) for dtype in DTYPES for spec in specs]
    return {str(case): partial(check_kernel, case) for case in cases}


def check_kernel(case: Case) -> Row:
    workload = make_workload(case)
    variants = make_variants(workload, [TRITON])[0]
    complaint = Reference(workload).complaint(next(variant for variant in variants if variant.name == TRITON))
    return {"failed": [complaint] if complaint else []}


def warm(sizes: Sizes, share: int, count: int) -> None:
    """Compile a share of the cases into the caches of Triton and torch.compile: first tiles, then the other ones."""
    for tiles, names in ((launch._launch, (TRITON, FUSED, COMPILED)), (compile_all, (TRITON,))):
        for case in [*gpu.layer_cases(sizes), *gpu.block_cases(sizes)][share::count]:
            workload = make_workload(case)
            with workload.differentiating(), mock.patch.object(launch, "_launch", tiles):
                for variant in make_variants(workload, [TRITON], COMPILED in names)[0]:
                    if variant.name in names:
                        workload.step(variant)


def compile_all(kernel: Any, sizes: Any, tiles: Iterable[launch.Tile], *args: Any, **constants: Any) -> None:
    """Compile a kernel for every tile, without running it."""
    for tile in () if launch.interpreting() else tiles:
        options = {"num_warps": tile.warps, "num_stages": tile.stages, **launch.OPTIONS}
        kernel.warmup(*args, grid=(1,), **constants, **dict(tile.blocks), **options)


def load(out: Path) -> Row:
    path = out / "gpu.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise SystemExit(f"{path} is damaged ({error}): remove it, or choose another folder with --out") from None


def save(record: Row, out: Path) -> None:
    write_text(out / "gpu.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    write_text(out / "gpu.md", page(record))


if __name__ == "__main__":
    sys.exit(main())
