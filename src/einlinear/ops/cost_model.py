"""The cost model of dispatch: amounts, and coefficients, shipped in costs.json or calibrated on this machine.

``einlinear bench --calibrate`` measures a machine and writes `calibrated_file`. Nothing is measured without it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from einlinear.files import atomic, cache_folder, check_private, differences, make_private, read_json
from einlinear.ops.backends import CPU_BACKENDS
from einlinear.structures import Structure
from einlinear.version import __version__

logger = logging.getLogger("einlinear")

COSTS_FILE = Path(__file__).with_name("costs.json")
# weights that a core keeps in its cache from one tile of tokens to the next; the same as HEAVY_ENTRIES in cpu/program.h
CACHED = 2**18
# `torch.nn.Linear` of the same size, which has coefficients as well
DENSE = "dense"
# by kind of pass ("forward", "train") and backend: what `amounts` are multiplied by
Coefficients = dict[str, dict[str, list[float]]]


class Costs(NamedTuple):
    """The coefficients in use, and a phrase that says where they come from."""

    coefficients: Coefficients
    source: str


@lru_cache(maxsize=1)
def costs() -> Costs:
    """Return the coefficients calibrated on this machine, or else the shipped ones."""
    try:
        path = calibrated_file()
        check_private(path)
        content = read_json(path)
        if changes := differences(content["machine"], fingerprint()):
            raise ValueError(f"it was calibrated elsewhere or otherwise: {'; '.join(changes)}")
        return Costs(_validated(content), "coefficients calibrated on this machine")
    except (FileNotFoundError, RuntimeError):
        # nothing was calibrated, or this user has no home folder
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        advice = "`einlinear bench --calibrate` writes it anew"
        logger.warning("einlinear ignores the cost model in %s (%s); %s", path, error or repr(error), advice)
    return Costs(read_costs(), "shipped coefficients")


def activations_moved(structure: Structure, tokens: int) -> int:
    """Return the number of inputs, intermediates and outputs that tokens have: what is moved through memory."""
    return tokens * (structure.in_features + sum(factor.result_size for factor in structure.factors))


def amounts(backend: str, structure: Structure, tokens: int) -> tuple[float, ...]:
    """Return what the coefficients of a backend, or of DENSE, multiply.

    Calls, steps, and millions of MACs, activations moved, weights read, and weights read for every tile of tokens.
    """
    if backend == DENSE:
        weights = structure.in_features * structure.out_features
        ends = tokens * (structure.in_features + structure.out_features)
        return 1, 1, tokens * weights / 1e6, ends / 1e6, weights / 1e6, 0
    moved = activations_moved(structure, tokens) / 1e6
    spilled = tokens * max(structure.params - CACHED, 0) / 1e6
    return 1, len(structure.factors), tokens * structure.macs / 1e6, moved, structure.params / 1e6, spilled


def read_costs() -> Coefficients:
    """Return the shipped coefficients."""
    return _validated(read_json(COSTS_FILE))


def write_calibrated(coefficients: Coefficients) -> Path:
    """Write the coefficients measured on this machine, for later processes. Raises OSError if the folder is unsafe."""
    path = calibrated_file()
    make_private(path.parent)
    with atomic(path) as scratch:
        # whatever the umask
        scratch.touch(mode=0o600)
        scratch.write_text(json.dumps({"machine": fingerprint(), **coefficients}, indent=2), encoding="utf-8")
    return path


def calibrated_file() -> Path:
    """Return the file of calibrated coefficients in the cache folder."""
    return cache_folder() / "costs.json"


def fingerprint() -> dict[str, Any]:
    """Return what the coefficients depend on."""
    versions = {"torch": torch.__version__, "einlinear": __version__}
    return {"processor": processor_model(), "cores": os.cpu_count(), **versions}


def processor_model() -> str:
    """Return the name of the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _validated(content: Any) -> Coefficients:
    """Return the coefficients of a file. Raises ValueError, KeyError or TypeError if some are missing or no costs."""
    found = {mode: {name: content[mode][name] for name in (DENSE, *CPU_BACKENDS)} for mode in ("forward", "train")}
    for mode, by_backend in found.items():
        for name, numbers in by_backend.items():
            if len(numbers) != 6 or not all(0 <= number < math.inf for number in numbers):
                raise ValueError(f"the costs of {name} ({mode}) are not six numbers from 0")
    return found
