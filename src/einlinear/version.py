"""Which code this is: the version, and a digest of the sources that results depend on."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

__version__ = version("einlinear")

_ROOT = Path(__file__).parents[1]
_SOURCES = (".py", ".cpp", ".h", ".json")  # costs.json chooses the backend


@cache  # what this process runs, whatever becomes of the files
def code_digest(*folders: str) -> str:
    """A digest of the sources in these folders of the packages installed here, such as "einlinear/ops".

    Returns:
        Eight hexadecimal digits. They are others when a source is changed, renamed, added or removed.
    """
    digest = hashlib.sha256()
    files = (file for folder in folders for file in (_ROOT / folder).rglob("*") if file.suffix in _SOURCES)
    for file in sorted(files):
        digest.update(file.relative_to(_ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:8]
