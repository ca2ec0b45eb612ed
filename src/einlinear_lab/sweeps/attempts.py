"""One run on a worker, of this machine or of a cluster: doing it, and saying what became of it."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from einlinear_lab.runs.execution import execute
from einlinear_lab.runs.run import Run
from einlinear_lab.training.loop import Progress

_STOP = "stop"  # the file in a run's folder that ends it
ATTEMPTS = 3  # of a run whose process dies every time
_PATIENCE = 30  # seconds to wait for a process that an earlier driver left behind


def stop(folder: Path) -> None:
    """Ask for the end of the run in a folder, wherever it is done: it is not worth its compute."""
    (folder / _STOP).touch()


def attempt(options: Mapping[str, Any], folder: Path, progress: Progress | None = None) -> dict[str, str]:
    """Do a run, from its options. What goes wrong with it becomes a message: a bug, its traceback.

    Returns:
        The status of its last event, "finished", "stopped" or "failed", and its message.

    Raises:
        BrokenPipeError: the driver that progress is reported to is gone.
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
            (folder / _STOP).unlink(missing_ok=True)  # whoever asks for the run again wants all of it
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


class _Stopped(Exception):
    """What ends a run that is not to go on."""
