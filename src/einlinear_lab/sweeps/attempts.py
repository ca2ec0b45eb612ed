"""Attempts of a worker process, local or on a cluster, to do a run."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from einlinear_lab.runs.execution import execute
from einlinear_lab.runs.run import Run
from einlinear_lab.training.loop import Progress

# Of a run whose process dies.
ATTEMPTS = 3
# File in the folder of a run that ends it.
_STOP = "stop"
# Seconds to wait for a process that an earlier driver left behind.
_PATIENCE = 30


def stop(folder: Path) -> None:
    """Stop the run in a folder, on whichever machine it is."""
    (folder / _STOP).touch()


def attempt(options: Mapping[str, Any], folder: Path, progress: Progress | None = None) -> dict[str, str]:
    """Do a run from its options. Errors become a message; bugs, a traceback.

    Returns:
        The status of the run's last event, "finished", "stopped" or "failed", and its message.

    Raises:
        BrokenPipeError: the driver has ended, so that progress cannot be reported.
    """
    began = time.monotonic()

    def watched(step: int, steps: int, loss: float) -> None:
        if (folder / _STOP).exists():
            raise _Stopped
        if progress is not None:
            progress(step, steps, loss)

    while True:
        try:
            execute(Run.of(options), folder, watched)
            return {"status": "finished"}
        except _Stopped:
            # The next attempt does the whole run.
            (folder / _STOP).unlink(missing_ok=True)
            return {"status": "stopped"}
        except BlockingIOError as error:
            if time.monotonic() > began + _PATIENCE:
                return {"status": "failed", "message": str(error)}
            time.sleep(1)
        except BrokenPipeError:
            raise
        except Exception as error:
            message = str(error) if isinstance(error, (ValueError, OSError)) else traceback.format_exc()
            return {"status": "failed", "message": message}


@contextmanager
def away() -> Iterator[None]:
    """Start processes from Python's own folder, so that they do not import from the current one.

    Python looks for modules where "python -c" starts, which is how multiprocessing starts processes, and Ray where
    `ray.init` was called: a file types.py or torch.py in the current folder would be executed. Python's option -P
    prevents it from 3.11 on.
    """
    current = os.getcwd()
    os.chdir(sys.prefix)
    try:
        yield
    finally:
        os.chdir(current)


class _Stopped(Exception):
    """`stop` was called for the run."""
