"""The cost model of backends on the CPU: a handful of coefficients for each, fitted to runs of ``einlinear bench``.

The coefficients in costs.json were fitted on one machine (docs/benchmarks): only ratios matter.
"""

from __future__ import annotations

import json
from pathlib import Path

from einlinear.structures import Structure

COSTS_FILE = Path(__file__).with_name("costs.json")
# Weights that a core keeps in its cache from one tile of tokens to the next: a megabyte of float32. The compiled kernel
# takes larger tiles above the same number (HEAVY_ENTRIES in cpu/program.h); the fit presumes it.
CACHED = 2**18
# `torch.nn.Linear` of the same size, which has coefficients as well
DENSE = "dense"


def read_costs() -> dict[str, dict[str, list[float]]]:
    """Return the coefficients of the `amounts`, for each kind of pass ("forward", "train") and backend."""
    content = json.loads(COSTS_FILE.read_text(encoding="utf-8"))
    return {mode: content[mode] for mode in ("forward", "train")}


COSTS = read_costs()


def microseconds(backend: str, structure: Structure, tokens: int, mode: str) -> float:
    """Return the estimate for a pass by a backend, or by DENSE."""
    return sum(c * amount for c, amount in zip(COSTS[mode][backend], amounts(backend, structure, tokens), strict=True))


def amounts(backend: str, structure: Structure, tokens: int) -> tuple[float, ...]:
    """Return the amounts that the coefficients multiply.

    Calls, steps, million MACs, million activations moved, million weights read, and million weights that are read for
    every token (or every tile of them) since they are more than stay in cache.
    """
    in_features, out_features = structure.in_features, structure.out_features
    if backend == DENSE:
        weights = in_features * out_features
        return 1, 1, tokens * weights / 1e6, tokens * (in_features + out_features) / 1e6, weights / 1e6, 0
    moved = tokens * (in_features + sum(factor.result_size for factor in structure.factors)) / 1e6
    spilled = tokens * max(structure.params - CACHED, 0) / 1e6
    return 1, len(structure.factors), tokens * structure.macs / 1e6, moved, structure.params / 1e6, spilled
