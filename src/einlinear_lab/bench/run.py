"""Measure cases, each with all its variants in interleaved rounds, into a file that can be resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

import torch

from einlinear import ops
from einlinear.nn.linear import explain
from einlinear_lab.bench import results
from einlinear_lab.bench.cases import BenchConfig, Case, estimate_traffic
from einlinear_lab.bench.check import Reference
from einlinear_lab.bench.machine import Roofline, measure_roofline, this_machine
from einlinear_lab.bench.memory import peak_bytes
from einlinear_lab.bench.results import Bench, BenchResult, Measurement, Session
from einlinear_lab.bench.timing import MIN_RUNS, interleave, spread
from einlinear_lab.bench.variants import BLOCKTT, COMPILED, COPYING, DENSE, Variant, make_variants, make_workload

FILE = "bench.json"


class Recorder:
    """The results in a folder, and the measurements that add to them.

    Args:
        folder: the folder, created if missing. Results of the same machine and config are resumed.
        cases: the cases to measure.
        config: the configuration of the measurements.
        command: the command line, for the record.
        fresh: whether to discard the results in the folder.
        reading: whether to accept complete results of another machine or config.

    Raises:
        ValueError: the folder holds results of another machine, version or config, or the device or backend does not
            exist.
    """

    def __init__(
        self,
        folder: Path,
        cases: Sequence[Case],
        config: BenchConfig,
        command: str = "",
        fresh: bool = False,
        reading: bool = False,
    ) -> None:
        self.path, self.cases = folder / FILE, tuple(cases)
        before = results.read(self.path) if self.path.exists() and not fresh else None
        if before and reading and set(cases) <= {result.case for result in before.results}:
            self.bench = before
            return
        device = cases[0].device
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device here")
        for name in config.backends or ():
            # raises for an unknown backend
            ops.unsupported(name, cases[0].build(), torch.float32, device)
        bench = Bench(this_machine(device), config)
        if before and (differences := bench.differences(before)):
            raise ValueError(
                f"{self.path} was measured elsewhere or otherwise: {'; '.join(differences)}. "
                "Name another folder (--out), or measure all of it again (--fresh)"
            )
        bench = before or bench
        session = Session(datetime.now().astimezone().isoformat(timespec="seconds"), command)
        self.bench = dataclasses.replace(bench, sessions=(*bench.sessions, session))

    @property
    def missing(self) -> list[Case]:
        """The cases without a result."""
        done = {result.case for result in self.bench.results}
        return [case for case in self.cases if case not in done]

    @property
    def results(self) -> list[BenchResult]:
        """The results of the cases, in their order."""
        by_case = {result.case: result for result in self.bench.results}
        return [by_case[case] for case in self.cases if case in by_case]

    def measure(self, case: Case) -> BenchResult:
        """Measure a case and save its result."""
        result = measure(case, self.bench.config, self.roofline(case))
        self.bench = dataclasses.replace(self.bench, results=(*self.bench.results, result))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        results.write(self.bench, self.path)
        return result

    def roofline(self, case: Case) -> Roofline:
        """Return the machine's peaks for a case, measured on first use."""
        key = f"{case.device} {case.dtype}"
        if key not in self.bench.rooflines:
            rooflines = self.bench.rooflines | {key: measure_roofline(case.dtype, case.device)}
            self.bench = dataclasses.replace(self.bench, rooflines=rooflines)
        return self.bench.rooflines[key]

    def estimate(self) -> float:
        """Estimate the seconds that the missing cases will take."""
        return sum(_estimate(case, self.bench.config, self.roofline(case)) for case in self.missing)


def measure(case: Case, config: BenchConfig, roofline: Roofline) -> BenchResult:
    """Check the outputs of all variants of a case; measure times, and in training peak memory, of the right ones."""
    p = make_workload(case)
    candidates, refused = make_variants(p, config.backends, config.compiled)
    calls = {DENSE: partial(p.step, Variant(DENSE, [p.dense.weight], p.dense))}
    wrong: dict[str, str] = {}
    with p.differentiating():
        reference = Reference(p)
        for variant in candidates:
            try:
                if complaint := reference.complaint(variant):
                    wrong[variant.name] = complaint
                else:
                    calls[variant.name] = partial(p.step, variant)
            except torch.OutOfMemoryError:
                refused[variant.name] = "out of memory"
            except RuntimeError as error:
                failed = refused if variant.name in (COMPILED, BLOCKTT) else wrong
                failed[variant.name] = f"it raised {error}"
        del reference
        peaks = {name: peak_bytes(call, case.device) for name, call in calls.items() if case.mode == "train"}
        seconds = interleave(calls, case.device, config.budget)
        # the choice depends on whether gradients are enabled
        choice = explain(p.layer, p.x).backend
    measured = [_measurement(name, seconds, peaks.get(name)) for name in seconds]
    measured += [Measurement(name, why, wrong=True) for name, why in wrong.items()]
    measured += [Measurement(name, why) for name, why in refused.items()]
    moved = estimate_traffic(case, p.structure)
    flops = 2 * case.passes * case.tokens * p.structure.macs
    return BenchResult(case, p.structure.macs, choice, moved, roofline.seconds(flops, moved.least), tuple(measured))


def _measurement(name: str, seconds: dict[str, list[float]], peak: int | None) -> Measurement:
    times = seconds[name]
    ratios = {
        other: spread([other_time / time for other_time, time in zip(seconds[other], times, strict=True)])
        for other in (DENSE, COPYING)
        if other != name and other in seconds
    }
    speedups = ratios.get(DENSE), ratios.get(COPYING)
    return Measurement(name, None, False, spread(times), len(times), *speedups, peak)


def _estimate(case: Case, config: BenchConfig, roofline: Roofline) -> float:
    """Estimate a case: dense at its peak, 5 variants (7 in training) at 2/3 of theirs, and the check in float64."""
    dense, structured = (
        roofline.seconds(2 * case.passes * case.tokens * macs, 4 * macs)
        for macs in (case.dense_macs, case.build().macs)
    )
    training = case.mode == "train"
    once = dense + (12 if training else 8) * structured
    compiling = 4.0 if config.compiled and case.mode != "decode" else 0.0
    return 0.1 + compiling + 6 * dense + (1 + training) * once + max(config.budget, MIN_RUNS * once)
