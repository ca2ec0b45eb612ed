"""The folder of fetched data."""

from __future__ import annotations

import os
from pathlib import Path


def data_dir() -> Path:
    """Return $EINLINEAR_DATA, or ~/.cache/einlinear where it is unset or empty."""
    return Path(os.environ.get("EINLINEAR_DATA") or "~/.cache/einlinear").expanduser()
