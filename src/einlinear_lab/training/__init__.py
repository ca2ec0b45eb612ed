"""Training one model: on one process or many, interrupted or not, the same steps.

config.py       what can be set
state.py        what a run has to remember, as tensors by name
distributed.py  the processes that torchrun starts
metrics.py      what happened, a JSON line at a time
trackers.py     and where else it is told: TensorBoard, W&B, MLflow
tasks.py        what models are trained to do
loop.py         train: the loop itself
"""

from einlinear_lab.training.config import Training
from einlinear_lab.training.loop import Outcome, Task, train

__all__ = ["Outcome", "Task", "Training", "train"]
