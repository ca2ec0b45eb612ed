"""Training of one model on one process or many; an interrupted run resumes exactly."""

from einlinear_lab.training.config import TrainingConfig
from einlinear_lab.training.loop import Outcome, Task, train

__all__ = ["Outcome", "Task", "TrainingConfig", "train"]
