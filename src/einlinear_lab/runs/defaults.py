"""Defaults that follow from the data: the number of steps and the batch size."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from einlinear_lab.runs.data import TextData
from einlinear_lab.runs.run import model_and_data

# Passes over the training data.
PASSES = 20
# Bounds of the steps.
FEWEST, MOST = 200, 5000
# Steps on data without end.
ENDLESS = 2000


def with_defaults(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Complete the options of a run with `steps` and `batch_size` that suit its data.

    The steps make 20 passes over the training data, within 200 and 5,000 steps; 2,000 steps where the data has no end.
    With fewer images than the default batch size, the batch size is a power of two of at most a quarter of them.

    Returns:
        The options, and a sentence for each that was added, with the reason. Both depend on options and data alone.

    Raises:
        ValueError, OSError: wrong data, or a wrong or unknown option.
    """
    completed, reasons = dict(options), list[str]()
    _, data = model_and_data(options)
    if {"steps", "batch_size"} <= options.keys():
        return completed, reasons
    examples, is_text = data.examples(), isinstance(data, TextData)
    if examples is not None and examples < data.batch_size and not is_text and "batch_size" not in options:
        size = completed["batch_size"] = 1 << max(0, (examples // 4).bit_length() - 1)
        data = dataclasses.replace(data, batch_size=size)
        reasons.append(f"batch_size={size}, as there are {examples:,} training images")
    if "steps" not in options and examples is None:
        completed["steps"] = ENDLESS
        reasons.append(f"steps={ENDLESS}")
    elif "steps" not in options and examples is not None:
        passes = PASSES * max(1, examples // data.batch_size)
        steps = completed["steps"] = min(max(passes, FEWEST), MOST)
        unit = "windows of the training text" if is_text else "training images"
        bound = "" if passes == steps else f", but at {'least' if steps == FEWEST else 'most'} {steps:,}"
        reasons.append(f"steps={steps}: {PASSES} passes over {examples:,} {unit}{bound}")
    return completed, reasons
