"""Fit the dispatcher's cost model to measurements.

``python -m einlinear_lab.bench.fit_costs docs/benchmarks/cpu*/bench.json`` writes ops/costs.json, which is shipped;
``einlinear bench --calibrate`` fits the coefficients of this machine.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import nnls

from einlinear.files import write_json
from einlinear.ops import cost_model, dispatch
from einlinear.ops.backends import CPU_BACKENDS
from einlinear_lab.bench.cases import Case
from einlinear_lab.bench.results import Bench, read
from einlinear_lab.bench.variants import DENSE


def timings(benches: Sequence[Bench]) -> Iterator[tuple[Case, str, dict[str, float]]]:
    """Yield all layers in float32 on the CPU, with the pass and the microseconds by backend, "dense" included."""
    for result in (result for bench in benches for result in bench.results):
        if (result.case.device, result.case.dtype, result.case.is_block) == ("cpu", "float32", False):
            mode = "train" if result.case.mode == "train" else "forward"
            names = {m.name: 1e6 * m.seconds.median for m in result.measurements if m.seconds}
            of_backends = {name: us for name, us in names.items() if name in CPU_BACKENDS}
            yield result.case, mode, {cost_model.DENSE: names[DENSE], **of_backends}


def fit(benches: Sequence[Bench]) -> cost_model.Coefficients:
    """Return non-negative coefficients of least relative error, for every pass and backend."""
    rows: dict[tuple[str, str], list[list[float]]] = {}
    for case, mode, times in timings(benches):
        for name, us in times.items():
            (structure,) = case.build()
            amounts = cost_model.amounts(name, structure, case.tokens)
            rows.setdefault((mode, name), []).append([amount / us for amount in amounts])
    fitted: cost_model.Coefficients = {"forward": {}, "train": {}}
    known = (cost_model.DENSE, *CPU_BACKENDS)
    missing = [f"{name} ({mode})" for mode in fitted for name in known if (mode, name) not in rows]
    if missing:
        raise ValueError(f"there are no measurements in float32 on the CPU of {', '.join(missing)}")
    for (mode, name), relative in rows.items():
        matrix = np.array(relative)
        scale = np.maximum(matrix.max(0), 1e-30)
        solution, _ = nnls(matrix / scale, np.ones(len(matrix)))
        fitted[mode][name] = [float(f"{c:.4g}") for c in solution / scale]
    return fitted


def losses(benches: Sequence[Bench]) -> list[tuple[float, Case]]:
    """Return the time of the chosen backend over that of the fastest, for every case, the worst first."""
    ratios = []
    for case, mode, times in timings(benches):
        (structure,), cpu = case.build(), torch.device("cpu")
        chosen = dispatch.choose(structure, case.tokens, torch.float32, cpu, mode == "train").backend
        ratios.append((times[chosen] / min(us for name, us in times.items() if name != cost_model.DENSE), case))
    return sorted(ratios, key=lambda loss: -loss[0])


def summary(benches: Sequence[Bench]) -> list[str]:
    """Return how good the choices by the coefficients in use are for these measurements, in lines of text."""
    ratios = losses(benches)
    close = sum(loss <= 1.1 for loss, _ in ratios) / len(ratios)
    head = f"{len(ratios)} cases, {cost_model.costs().source}; chosen within 10 % of the fastest: {close:.0%}"
    return [head, *(f"  {loss:.2f}  {case}" for loss, case in ratios[:5])]


def calibrate(bench: Bench) -> Path:
    """Fit the coefficients of this machine to a run of the suite "calibration"; return the file that has them now."""
    path = cost_model.write_calibrated(fit([bench]))
    dispatch.forget()
    return path


def stale(fitted: cost_model.Coefficients) -> list[str]:
    """Return the backends whose coefficients in ops/costs.json differ from these by more than 1 %."""
    stored, outdated = cost_model.read_costs(), []
    for mode, by_backend in fitted.items():
        for name, coefficients in by_backend.items():
            if not all(math.isclose(*pair, rel_tol=0.01) for pair in zip(coefficients, stored[mode][name])):
                outdated.append(f"{name} ({mode})")
    return outdated


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m einlinear_lab.bench.fit_costs", description=__doc__)
    parser.add_argument("files", nargs="*", help="bench.json of some runs (default: those that ops/costs.json names)")
    parser.add_argument("--check", action="store_true", help="only check that ops/costs.json is the fit of the files")
    options = parser.parse_args(arguments)
    files = options.files or json.loads(cost_model.COSTS_FILE.read_text(encoding="utf-8"))["fitted_to"]
    try:
        benches = [read(Path(file)) for file in files]
        fitted = fit(benches)
    except ValueError as error:
        parser.error(str(error))
    if options.check:
        outdated = stale(fitted)
        verdict = f"is not the fit of these files: {', '.join(outdated)}" if outdated else "is the fit of these files"
        print(f"{cost_model.COSTS_FILE} {verdict}")
        return 1 if outdated else 0
    write_json(cost_model.COSTS_FILE, {"fitted_to": files, **fitted})
    dispatch.forget()
    print("\n".join(summary(benches)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
