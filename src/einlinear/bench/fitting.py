"""Fit the dispatcher's cost model to measurements.

``python -m einlinear.bench.fitting docs/benchmarks/cpu*/bench.json`` writes ops/costs.json, and prints how much is lost
by choosing with the model instead of always taking the fastest executor.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import nnls

from einlinear.bench.cases import Case
from einlinear.bench.results import Bench, read
from einlinear.bench.variants import DENSE
from einlinear.ops import costs as model
from einlinear.ops import dispatch
from einlinear.ops.executors import CPU_EXECUTORS


def timings(benches: Sequence[Bench]) -> Iterator[tuple[Case, str, dict[str, float]]]:
    """Of every case on the CPU in float32: the kind of pass, and microseconds by executor (dense is one)."""
    for result in (result for bench in benches for result in bench.results):
        if (result.case.device, result.case.dtype) == ("cpu", "float32"):
            mode = "train" if result.case.mode == "train" else "forward"
            names = {m.name: 1e6 * m.seconds.median for m in result.measurements if m.seconds}
            yield (
                result.case,
                mode,
                {model.DENSE: names[DENSE], **{name: us for name, us in names.items() if name in CPU_EXECUTORS}},
            )


def fit(benches: Sequence[Bench]) -> dict[str, dict[str, list[float]]]:
    """Non-negative coefficients of least relative error, for every kind of pass and executor."""
    rows: dict[tuple[str, str], list[list[float]]] = {}
    for case, mode, times in timings(benches):
        for name, us in times.items():
            amounts = model.amounts(name, case.build(), case.tokens)
            rows.setdefault((mode, name), []).append([amount / us for amount in amounts])
    costs: dict[str, dict[str, list[float]]] = {"forward": {}, "train": {}}
    known = (model.DENSE, *CPU_EXECUTORS)
    missing = [f"{name} ({mode})" for mode in costs for name in known if (mode, name) not in rows]
    if missing:
        raise ValueError(f"there are no measurements in float32 on the CPU of {', '.join(missing)}")
    for (mode, name), relative in rows.items():
        matrix = np.array(relative)
        scale = np.maximum(matrix.max(0), 1e-30)  # of very different sizes: columns are scaled to one
        solution, _ = nnls(matrix / scale, np.ones(len(matrix)))
        costs[mode][name] = [float(f"{c:.4g}") for c in solution / scale]
    return costs


def losses(benches: Sequence[Bench]) -> list[tuple[float, Case]]:
    """The time of the chosen executor over that of the fastest, for every case, the worst first."""
    found = []
    for case, mode, times in timings(benches):
        chosen = dispatch.choose(
            case.build(), case.tokens, torch.float32, torch.device("cpu"), mode == "train"
        ).executor
        found.append((times[chosen] / min(us for name, us in times.items() if name != model.DENSE), case))
    return sorted(found, key=lambda loss: -loss[0])


def main(*paths: str) -> None:
    benches = [read(Path(path)) for path in paths]
    costs = {"fitted_to": paths, **fit(benches)}
    model.COSTS_FILE.write_text(json.dumps(costs, indent=2) + "\n", encoding="utf-8")
    model.COSTS.clear()
    model.COSTS.update(model.read_costs())
    dispatch.forget()
    found = losses(benches)
    close = sum(loss <= 1.1 for loss, _ in found) / len(found)
    print(f"{len(found)} cases; chosen within 10 % of the fastest: {close:.0%}; the worst:")
    for loss, case in found[:5]:
        print(f"  {loss:.2f}  {case}")


if __name__ == "__main__":
    main(*sys.argv[1:])
