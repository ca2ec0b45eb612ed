"""What can be known to be wrong with runs before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from einlinear_lab.runs.data import Data, TrainingProblem
from einlinear_lab.runs.run import Run


def check_runs(runs: Iterable[Run]) -> dict[Data, str]:
    """Load the data of all runs and build every model without memory, so that nothing is trained in vain.

    Returns:
        The digest of each data.

    Raises:
        ValueError, OSError: what is wrong with the data, a structure or a size.
    """
    problems: dict[Data, TrainingProblem] = {}
    for run in runs:
        if run.data not in problems:
            problems[run.data] = run.data.load(run.seed)
        with torch.device("meta"):
            run.model.build(problems[run.data].shape)
    return {data: problem.digest for data, problem in problems.items()}
