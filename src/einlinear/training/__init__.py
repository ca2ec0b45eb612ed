"""Training one model: on one process or many, interrupted or not, the same steps.

config.py       what can be set
schedule.py     the learning rate over the steps
state.py        what a run has to remember, as tensors by name
distributed.py  the processes that torchrun starts
metrics.py      what happened, a JSON line at a time
trackers.py     and where else it is told: TensorBoard, W&B, MLflow
muon.py         Muon, for structured matrices too
tasks.py        what models are trained to do
loop.py         train: the loop itself
"""

from einlinear.training.config import Training
from einlinear.training.loop import Outcome, Task, train
from einlinear.training.muon import Muon

__all__ = ["Muon", "Outcome", "Task", "Training", "train"]
