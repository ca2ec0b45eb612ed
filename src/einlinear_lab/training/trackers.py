"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases or MLflow, each of which has to be installed.

A tracker is called with a step and its values. Which server and project they go to is said in the environment, as these
packages have it: WANDB_PROJECT, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and the like. The id that W&B or MLflow
gives a run is kept in its folder, so that a run that was interrupted goes on as the same one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

Tracker: TypeAlias = Callable[[int, Mapping[str, float]], None]
TRACKERS = ("tensorboard", "wandb", "mlflow")  # each is the name of its package as well


def check_installed(name: str) -> None:
    """Raise ModuleNotFoundError if a tracker's package is missing."""
    if find_spec(name) is None:
        raise ModuleNotFoundError(f"tracker={name!r} needs a package that is not installed: pip install {name}")


@contextmanager
def opened(name: str, folder: Path, start: int, facts: Mapping[str, Any]) -> Iterator[Tracker]:
    """A tracker of a run, closed in the end.

    Args:
        name: one of `TRACKERS`.
        folder: of the run; its name is that of the run.
        start: the step that the run goes on from.
        facts: what identifies the run, shown with it.
    """
    id_file = folder / f"{name}-id"
    known = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder / name), purge_step=start + 1) as writer:
            if start == 0:
                writer.add_text("facts", json.dumps(facts, indent=4), 0)

            def write(step: int, values: Mapping[str, float]) -> None:
                for key, value in values.items():
                    writer.add_scalar(key, value, step)

            yield write
    elif name == "wandb":
        import wandb

        with wandb.init(name=folder.name, dir=folder, config=dict(facts), id=known, resume="allow") as run:
            id_file.write_text(run.id, encoding="utf-8")
            yield lambda step, values: run.log(dict(values), step=step)
    else:
        import mlflow

        with mlflow.start_run(run_id=known, run_name=folder.name) as run:
            id_file.write_text(run.info.run_id, encoding="utf-8")
            mlflow.log_params(dict(facts))
            yield lambda step, values: mlflow.log_metrics(dict(values), step=step)
