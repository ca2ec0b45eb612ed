"""Training of one model on one process or many; an interrupted run resumes exactly.

config.py       config of a training
loop.py         train, the training loop
tasks.py        data, loss and metrics of classification, language modelling and regression
guided.py       self-guided training
distributed.py  the processes of torchrun
state.py        tensors of a checkpoint
metrics.py      metrics.jsonl
trackers.py     TensorBoard, W&B, MLflow
"""

from einlinear_lab.training.config import Training
from einlinear_lab.training.loop import Outcome, Task, train

__all__ = ["Outcome", "Task", "Training", "train"]
