"""Where fetched data are kept."""

from __future__ import annotations

import os
from pathlib import Path


def data_dir() -> Path:
    """The folder of fetched data: $EINLINEAR_DATA, or ~/.cache/einlinear where that is unset or empty."""
    return Path(os.environ.get("EINLINEAR_DATA") or "~/.cache/einlinear").expanduser()
