"""One thread for all experiments: models this small run slower on several, and far slower on a busy machine."""

import torch

torch.set_num_threads(1)
