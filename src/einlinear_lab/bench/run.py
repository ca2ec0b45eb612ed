"""Measuring: one case after the other, each with all its variants in turns, into a file that can be continued."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

import torch

from einlinear import ops
from einlinear.nn.explanation import explain
from einlinear_lab.bench import results
from einlinear_lab.bench.cases import Case, Settings
from einlinear_lab.bench.check import Reference
from einlinear_lab.bench.machine import Roof, measure_roof, this_machine
from einlinear_lab.bench.memory import peak_bytes
from einlinear_lab.bench.results import Bench, Measurement, Result, Session
from einlinear_lab.bench.timing import LEAST, interleave, spread
from einlinear_lab.bench.traffic import traffic
from einlinear_lab.bench.variants import BLOCKTT, COMPILED, COPYING, DENSE, Variant, problem, variants

FILE = "bench.json"


class Recorder:
    """A folder's results, and what adds to them.

    Args:
        folder: created if it is absent. One of the same machine and settings is continued.
        cases: what is wanted.
        settings: how they are measured.
        command: the command line, for the record.
        fresh: whether to forget what the folder holds.
        reading: whether results of another machine or settings will do, provided that they are complete.

    Raises:
        ValueError: the folder holds results of another machine, other versions or settings; there is no such device
            or backend.
    """

    def __init__(
        self,
        folder: Path,
        cases: Sequence[Case],
        settings: Settings,
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
        for name in settings.backends or ():
            ops.unsupported(name, cases[0].build(), torch.float32, device)  # raises where there is no such backend
        self.bench = Bench(this_machine(device), settings)
        differences = self.bench.differences(before) if before else []
        if differences:
            raise ValueError(
                f"{self.path} was measured elsewhere or otherwise: {'; '.join(differences)}. "
                "Name another folder (--out), or measure all of it again (--fresh)"
            )
        session = Session(datetime.now().astimezone().isoformat(timespec="seconds"), command)
        self.bench = before or self.bench
        self.bench = dataclasses.replace(self.bench, sessions=(*self.bench.sessions, session))

    @property
    def missing(self) -> list[Case]:
        """The cases that have no result yet."""
        done = {result.case for result in self.bench.results}
        return [case for case in self.cases if case not in done]

    @property
    def results(self) -> list[Result]:
        """Those of the cases that are wanted, in their order."""
        found = {result.case: result for result in self.bench.results}
        return [found[case] for case in self.cases if case in found]

    def measure(self, case: Case) -> Result:
        """Measure a case and keep its result."""
        result = measure(case, self.bench.settings, self.roof(case))
        self.bench = dataclasses.replace(self.bench, results=(*self.bench.results, result))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        results.write(self.bench, self.path)
        return result

    def roof(self, case: Case) -> Roof:
        """The machine's peaks for a case, measured when they are first asked for."""
        key = f"{case.device} {case.dtype}"
        if key not in self.bench.roofs:
            roofs = self.bench.roofs | {key: measure_roof(case.dtype, case.device)}
            self.bench = dataclasses.replace(self.bench, roofs=roofs)
        return self.bench.roofs[key]

    def estimate(self) -> float:
        """About how many seconds the missing cases will take."""
        return sum(_estimate(case, self.bench.settings, self.roof(case)) for case in self.missing)


def measure(case: Case, settings: Settings, roof: Roof) -> Result:
    """Check all variants of a case, time those that are right in turns, and in training take their peak memory."""
    p = problem(case)
    found, refused = variants(p, settings.backends, settings.compiled)
    calls = {DENSE: partial(p.step, Variant(DENSE, [p.dense.weight], p.dense))}
    wrong: dict[str, str] = {}
    with p.differentiating():
        reference = Reference(p)
        for variant in found:
            try:
                complaint = reference.complaint(variant)
            except torch.OutOfMemoryError:
                refused[variant.name] = "out of memory"
            except RuntimeError as error:
                blame = refused if variant.name in (COMPILED, BLOCKTT) else wrong
                blame[variant.name] = f"it raised {error}"
            else:
                if complaint is None:
                    calls[variant.name] = partial(p.step, variant)
                else:
                    wrong[variant.name] = complaint
        del reference
        peaks = {name: peak_bytes(call, case.device) for name, call in calls.items() if case.mode == "train"}
        seconds = interleave(calls, case.device, settings.budget)
        choice = explain(p.layer, p.x).backend  # inside: it depends on whether there are gradients
    measured = [_measurement(name, seconds, peaks.get(name)) for name in seconds]
    measured += [Measurement(name, why, wrong=True) for name, why in wrong.items()]
    measured += [Measurement(name, why) for name, why in refused.items()]
    moved = traffic(case, p.structure)
    flops = 2 * case.passes * case.tokens * p.structure.macs
    return Result(case, p.structure.macs, choice, moved, roof.seconds(flops, moved.least), tuple(measured))


def _measurement(name: str, seconds: dict[str, list[float]], peak: int | None) -> Measurement:
    own = seconds[name]
    ratios = {
        other: spread([theirs / mine for theirs, mine in zip(seconds[other], own, strict=True)])
        for other in (DENSE, COPYING)
        if other != name and other in seconds
    }
    return Measurement(
        name,
        seconds=spread(own),
        runs=len(own),
        speedup=ratios.get(DENSE),
        over_copying=ratios.get(COPYING),
        peak_bytes=peak,
    )


def _estimate(case: Case, settings: Settings, roof: Roof) -> float:
    """Dense at its peak, five variants and two more in training at two thirds of theirs, and the check in float64."""
    dense, own = (
        roof.seconds(2 * case.passes * case.tokens * macs, 4 * macs) for macs in (case.dense_macs, case.build().macs)
    )
    training = case.mode == "train"
    once = dense + (12 if training else 8) * own
    compiling = 4.0 if settings.compiled and case.mode != "decode" else 0.0
    return 0.1 + compiling + 6 * dense + (1 + training) * once + max(settings.budget, LEAST * once)
