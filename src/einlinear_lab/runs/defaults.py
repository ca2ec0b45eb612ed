"""Options that follow from the data where they are not given: how many steps, and of how many examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from einlinear_lab.runs.data import TextData
from einlinear_lab.runs.options import names
from einlinear_lab.runs.run import Run
from einlinear_lab.training import Training

PASSES = 20  # over the training data
FEWEST, MOST = 200, 5000  # steps
ENDLESS = 2000  # steps on data without end


def with_defaults(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Complete the options of a run by `steps` and `batch_size` that suit its data.

    Steps make 20 passes over the training data, but at least 200 and at most 5,000 of them; 2,000 where the data has
    no end. A batch has what it has by default, or, of fewer images than that, a power of two of at most a quarter of
    them.

    Returns:
        The options, and for each that was added a sentence that says why. Both are the same whenever the data is.

    Raises:
        ValueError, OSError: what is wrong with the data or an option.
    """
    found = dict(options)
    why: list[str] = []
    of_training = {field for field in names(Training) if field in found}
    data = Run.of({name: value for name, value in found.items() if name not in of_training} | {"steps": 1}).data
    if {"steps", "batch_size"} <= found.keys():
        return found, why
    examples = data.examples()
    is_fixed = "batch_size" in found or isinstance(data, TextData)
    if examples is not None and not is_fixed and examples < data.batch_size:
        size = 1 << max(0, (examples // 4).bit_length() - 1)
        data = dataclasses.replace(data, batch_size=size)
        found["batch_size"] = size
        why.append(f"batch_size={size}, as there are {examples:,} training images")
    if "steps" not in found:
        if examples is None:
            found["steps"] = ENDLESS
            why.append(f"steps={ENDLESS}")
        else:
            passes = PASSES * max(1, examples // data.batch_size)
            found["steps"] = min(max(passes, FEWEST), MOST)
            what = "windows of the training text" if isinstance(data, TextData) else "training images"
            bound = {FEWEST: f", but at least {FEWEST}", MOST: f", but at most {MOST:,}"}.get(found["steps"], "")
            bound = "" if passes == found["steps"] else bound
            why.append(f"steps={found['steps']}: {PASSES} passes over {examples:,} {what}{bound}")
    return found, why
