"""Starting processes that import nothing from the current folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def away() -> Iterator[None]:
    """Be in Python's own folder, and back again in the end: processes that are started meanwhile start there.

    Python looks for modules in the folder where "python -c" starts, which is how multiprocessing starts processes, and
    Ray's look where `ray.init` was called. So a file types.py or torch.py in the current folder would be executed.
    Python's option -P is against it, from 3.11 on.
    """
    here = os.getcwd()
    os.chdir(sys.prefix)
    try:
        yield
    finally:
        os.chdir(here)
