"""Measure cases, each with all its variants in interleaved rounds, into a file that can be resumed.

No speed is reported without a check of the output in float64, within four times the error of the dense matmul in the
same dtype. For gradients of factors and biases the tolerance grows with the square root of the number of terms in their
sums.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from einlinear import ops
from einlinear.nn.explanation import explain
from einlinear_lab.bench import results
from einlinear_lab.bench.cases import BenchConfig, Case, estimate_traffic
from einlinear_lab.bench.cold import interleave_cold
from einlinear_lab.bench.machine import Roofline, measure_roofline, this_machine
from einlinear_lab.bench.memory import peak_bytes
from einlinear_lab.bench.results import Bench, BenchResult, Measurement, Session
from einlinear_lab.bench.timing import MIN_RUNS, PATIENCE, interleave, spread
from einlinear_lab.bench.variants import (
    COPYING,
    DENSE,
    FOREIGN,
    FUSED,
    OURS,
    Variant,
    Workload,
    make_block,
    make_variants,
    make_workload,
)

FILE = "bench.json"
_SLACK = 4.0
# the most time for a case, in budgets: dense layers of half precision take minutes on some processors
_MOST = 200


class Recorder:
    """The results in a folder, and the measurements that add to them.

    Results of the same machine and config are resumed unless `fresh`; others raise ValueError, unless `reading` and
    complete.
    """

    def __init__(
        self,
        folder: Path,
        cases: Sequence[Case],
        config: BenchConfig,
        command: str = "",
        *,
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
            ops.reason_unsupported(name, cases[0].build()[0], torch.float32, device)
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
        """The cases without a result, without those that are too slow for the budget."""
        return [case for case in self._unmeasured if self._seconds(case) <= self.limit]

    @property
    def too_slow(self) -> list[Case]:
        """The cases without a result that are left out, because they would take longer than `limit`."""
        return [case for case in self._unmeasured if self._seconds(case) > self.limit]

    @property
    def limit(self) -> float:
        """The most seconds for a case, checks included."""
        return _MOST * max(self.bench.config.budget, 0.1)

    @property
    def _unmeasured(self) -> list[Case]:
        done = {result.case for result in self.bench.results}
        return [case for case in self.cases if case not in done]

    def _seconds(self, case: Case) -> float:
        return _estimate(case, self.bench.config, self.roofline(case))

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
            self.bench.rooflines[key] = measure_roofline(case.dtype, case.device)
        return self.bench.rooflines[key]

    def estimate(self) -> float:
        """Estimate the seconds that the missing cases will take."""
        return sum(map(self._seconds, self.missing))


def _estimate(case: Case, config: BenchConfig, roofline: Roofline) -> float:
    """Estimate a case: dense at its peak, the other variants at 2/3 of theirs, the check in float64, and stacks."""
    all_macs = (case.dense_macs, sum(structure.macs for structure in case.build()))
    dense, structured = (roofline.seconds(2 * case.passes * case.tokens * macs, 4 * macs) for macs in all_macs)
    training = case.mode == "train"
    backends = len(ops.BACKENDS) - 1 if config.backends is None else len(config.backends)
    # el.Linear and the copying baseline; in training, saving and recomputing
    once = dense + 1.6 * (backends + 2 + 2 * training) * structured
    compiling = 4.0 if config.compiled and case.mode != "decode" else 0.0
    return (
        0.1
        + 1.0 * case.cold
        + compiling
        + 6 * dense
        + (1 + training) * once
        + max(config.budget, min(MIN_RUNS * once, PATIENCE + once))
    )


def measure(case: Case, config: BenchConfig, roofline: Roofline) -> BenchResult:
    """Check the outputs of all variants of a case; measure times, and in training peak memory, of the right ones."""
    p = make_workload(case)
    candidates, refused = make_variants(p, config.backends, config.compiled)
    right = [p.dense]
    wrong: dict[str, str] = {}
    with p.differentiating():
        reference = Reference(p)
        for variant in candidates:
            try:
                if complaint := reference.complaint(variant):
                    wrong[variant.name] = complaint
                else:
                    right.append(variant)
            except torch.OutOfMemoryError:
                refused[variant.name] = "out of memory"
            except RuntimeError as error:
                failed = refused if variant.name in FOREIGN else wrong
                failed[variant.name] = f"it raised {error}"
        del reference
        calls = {variant.name: partial(p.step, variant) for variant in right}
        peaks = {name: peak_bytes(call, case.device) for name, call in calls.items() if case.mode == "train"}
        cold = interleave_cold(calls, right, config.budget) if case.cold else None
        seconds = cold.seconds if cold else interleave(calls, case.device, config.budget)
        # the choice depends on whether gradients are enabled
        choice = _choice(p)
    rivals = (DENSE, OURS) if case.is_block else (DENSE, COPYING)
    measured = [_measurement(name, rivals, seconds, peaks.get(name)) for name in seconds]
    measured += [Measurement(name, why, wrong=True) for name, why in wrong.items()]
    measured += [Measurement(name, why) for name, why in refused.items()]
    moved, macs = estimate_traffic(case, *p.structures), sum(structure.macs for structure in p.structures)
    flops = 2 * case.passes * case.tokens * macs
    least = roofline.seconds(flops, moved.least)
    read = (cold.stack_bytes, cold.piece_bytes / spread(cold.reads).median) if cold else (None, None)
    return BenchResult(case, macs, choice, moved, least, tuple(measured), *read)


def _choice(p: Workload) -> str:
    """Return the backend of a layer, or whether a block is fused."""
    if not p.case.is_block:
        return explain(p.layers[0], p.x).backend
    return "layer by layer" if make_block(p).reason_not_to_fuse(p.x) else FUSED


def _measurement(name: str, rivals: Sequence[str], seconds: dict[str, list[float]], peak: int | None) -> Measurement:
    ratios = {
        other: spread([other_time / time for other_time, time in zip(seconds[other], seconds[name], strict=True)])
        for other in rivals
        if other != name and other in seconds
    }
    return Measurement(
        name,
        seconds=spread(seconds[name]),
        runs=len(seconds[name]),
        speedup=ratios.get(DENSE),
        over_copying=ratios.get(COPYING),
        over_layers=ratios.get(OURS),
        peak_bytes=peak,
    )


class Reference:
    """The exact output and gradients of a workload in float64, and the errors of dense layers of the same matrices."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        (x,) = _double([workload.x])
        # a list per layer
        factors_of = [_double(layer.factors()) for layer in workload.layers]
        biases_of = [_double([] if layer.bias is None else [layer.bias]) for layer in workload.layers]
        weights = [ops.dense_weight(*layer) for layer in zip(workload.structures, factors_of, strict=True)]
        both = zip(weights, biases_of, strict=True)
        layers = [partial(F.linear, weight=weight, bias=next(iter(bias), None)) for weight, bias in both]
        y = workload.through(layers, x)
        outputs: list[Tensor] = [y.detach()]
        self._of_factors: list[Tensor] = []
        if workload.case.mode == "train":
            factors, biases = list(chain(*factors_of)), list(chain(*biases_of))
            grads = torch.autograd.grad(y, [x, *weights, *biases, *factors], workload.grad.double())
            outputs += grads[: -len(factors)]
            self._of_factors += grads[-len(factors) :]
        # y, and the gradients of the input, of the weights and of the biases
        self._of_dense = outputs
        pairs = zip(workload.step(workload.dense), outputs, strict=True)
        self._errors = [_error(output, exact) for output, exact in pairs]

    def complaint(self, variant: Variant) -> str | None:
        """Return the error of a variant beyond its tolerance in words, or None."""
        outputs = self._workload.step(variant)
        for (name, exact, tolerances), output in zip(self._expected(variant), outputs, strict=True):
            for off, allowed in zip(_error(output, exact), tolerances, strict=True):
                # also true for NaN
                if not off <= allowed:
                    return f"the {name} is off by {off:.1e} of its size, where {allowed:.1e} is allowed"
        return None

    def _expected(self, variant: Variant) -> Iterator[tuple[str, Tensor, list[float]]]:
        """Yield the name of every output of a variant, its exact value, and the tolerances of both its errors."""
        eps = torch.finfo(self._workload.x.dtype).eps

        def tolerances(error: Sequence[float], slack: float = _SLACK, least: float = 0.0) -> list[float]:
            return [max(slack * max(limit, eps), least) for limit in error]

        both = list(zip(self._of_dense, map(tolerances, self._errors), strict=True))
        yield "output", *both[0]
        if not self._of_factors:
            return
        yield "gradient of the input", *both[1]
        structures = self._workload.structures
        of_weights, of_biases = self._errors[2 : 2 + len(structures)], slice(2 + len(structures), None)
        of_factors = (pair for pair in zip(structures, of_weights, strict=True) for _ in pair[0].factors)
        stored = zip(variant.stored(self._of_factors), of_factors, strict=True)
        for i, (exact, (structure, error)) in enumerate(stored, 1):
            terms = max(factor.macs / factor.params for factor in structure.factors)
            yield f"gradient of weight {i}", exact, tolerances(error, _SLACK * math.sqrt(terms))
        # of sums of one term after the other, in float32
        least = _SLACK * math.sqrt(self._workload.case.tokens) * torch.finfo(torch.float32).eps
        for exact, error in zip(self._of_dense[of_biases], self._errors[of_biases], strict=True):
            yield "gradient of the bias", exact, tolerances(error, least=least)


def _double(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_(torch.is_grad_enabled()) for tensor in tensors]


def _error(output: Tensor, exact: Tensor) -> tuple[float, float]:
    """Return the error relative to the root mean square of the exact values: of all entries, and of the worst."""
    if output.shape != exact.shape:
        return math.inf, math.inf
    error = output.detach().double() - exact
    size = exact.square().mean().sqrt()
    return float(error.square().mean().sqrt() / size), float(error.abs().max() / size)
