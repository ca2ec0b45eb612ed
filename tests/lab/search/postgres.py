"""A PostgreSQL server of a test's own, from the system's packages."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def _programs() -> Path | None:
    """The folder with initdb and postgres: Debian keeps it off the PATH."""
    if found := shutil.which("initdb"):
        return Path(found).parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """The URL of a new database. A test is skipped where there is no PostgreSQL, but not in CI."""
    programs = _programs()
    if programs is None:
        if os.environ.get("CI") == "true":
            pytest.fail("PostgreSQL is not installed: .ci/run installs it")
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    data = folder / "postgres"
    data.mkdir()
    user: list[str] = []
    if os.getuid() == 0:  # it refuses to be run by root
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        shutil.chown(data, "postgres", "postgres")
        for parent in (folder, *folder.parents):
            if parent.owner() == "root" and parent != Path("/"):
                parent.chmod(parent.stat().st_mode | 0o011)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [*user, str(programs / "initdb"), "-D", str(data), "-U", "tests", "--auth=trust", "--no-sync"]
    subprocess.run(start, check=True, capture_output=True, cwd=data)
    options = ["-D", str(data), "-p", str(port), "-c", "listen_addresses=127.0.0.1", "-k", str(data), "-c", "fsync=off"]
    with (folder / "postgres.log").open("wb") as log:
        process = subprocess.Popen([*user, str(programs / "postgres"), *options], stdout=log, stderr=log, cwd=data)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        time.sleep(0.5)  # it listens before it takes connections
        yield f"postgresql+psycopg://tests@127.0.0.1:{port}/postgres"
    finally:
        process.terminate()
        process.wait(30)
