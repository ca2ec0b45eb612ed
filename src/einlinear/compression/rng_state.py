"""State of torch's global generators, which belong to the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def preserved_rng_state() -> Iterator[None]:
    """Restore the states of the global generators at the end: new layers draw weights, even if others replace them."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        yield
