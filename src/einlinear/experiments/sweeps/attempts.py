"""One run on a worker, of this machine or of a cluster: doing it, and saying what became of it."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from einlinear.experiments.runs.execute import execute
from einlinear.experiments.runs.run import Run
from einlinear.training.loop import Progress

ATTEMPTS = 3  # of a run whose process dies every time
_PATIENCE = 30  # seconds to wait for a process that an earlier driver left behind


def attempt(options: Mapping[str, Any], folder: Path, progress: Progress | None = None) -> dict[str, str]:
    """Do a run, from its options. What goes wrong with it becomes a message: a bug, its traceback.

    Returns:
        The status of its last event, "finished" or "failed", and its message.

    Raises:
        BrokenPipeError: the driver that progress is reported to is gone.
    """
    began = time.monotonic()
    while True:
        try:
            execute(Run.of(options), folder, progress)
            return {"status": "finished"}
        except BlockingIOError as error:
            if time.monotonic() > began + _PATIENCE:
                return {"status": "failed", "message": str(error)}
            time.sleep(1)
        except BrokenPipeError:
            raise
        except Exception as error:
            message = str(error) if isinstance(error, (ValueError, OSError)) else traceback.format_exc()
            return {"status": "failed", "message": message}
