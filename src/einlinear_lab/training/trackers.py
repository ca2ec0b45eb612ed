"""Experiment trackers that receive the metrics as well: TensorBoard, Weights & Biases, MLflow.

The packages read server and project from the environment: WANDB_PROJECT, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME.
The run's folder keeps the id that W&B or MLflow assigned, so that an interrupted run resumes under the same id.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

Tracker: TypeAlias = Callable[[int, Mapping[str, float]], None]
# Names of the packages.
TRACKERS = ("tensorboard", "wandb", "mlflow")


def check_installed(name: str) -> None:
    """Raise ModuleNotFoundError if the package of a tracker is not installed."""
    if find_spec(name) is None:
        raise ModuleNotFoundError(f"tracker={name!r} needs a package that is not installed: pip install {name}")


@contextmanager
def opened(name: str, folder: Path, start: int, facts: Mapping[str, Any]) -> Iterator[Tracker]:
    """Open the tracker of a run and close it on exit.

    Args:
        name: one of `TRACKERS`.
        folder: of the run; its name becomes the run's name.
        start: step from which the run resumes.
        facts: identity of the run, shown by the tracker.
    """
    id_file = folder / f"{name}-id"
    run_id = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None
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

        with wandb.init(name=folder.name, dir=folder, config=dict(facts), id=run_id, resume="allow") as run:
            id_file.write_text(run.id, encoding="utf-8")
            yield lambda step, values: run.log(dict(values), step=step)
    else:
        import mlflow

        with mlflow.start_run(run_id=run_id, run_name=folder.name) as run:
            id_file.write_text(run.info.run_id, encoding="utf-8")
            mlflow.log_params(dict(facts))
            yield lambda step, values: mlflow.log_metrics(dict(values), step=step)
