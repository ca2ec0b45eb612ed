"""Version, and a digest of the sources that results depend on."""

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

__version__ = version("einlinear")

_ROOT = Path(__file__).parents[1]


# cached: what this process runs, even if the files change
@cache
def code_digest(*folders: str) -> str:
    """Return eight hexadecimal digits of the sources in folders of the installed packages, such as "einlinear/ops"."""
    digest = hashlib.sha256()
    files = (file for folder in folders for file in (_ROOT / folder).rglob("*"))
    # costs.json chooses the backend
    for file in sorted(file for file in files if file.suffix in (".py", ".cpp", ".h", ".json")):
        digest.update(file.relative_to(_ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:8]
