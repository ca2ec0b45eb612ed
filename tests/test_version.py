"""The digest of the sources that results depend on."""

import importlib.metadata
import runpy
import shutil
from pathlib import Path

import pytest

from einlinear import version
from einlinear_lab.runs.records import _DECISIVE


def test_the_digest_is_of_all_that_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above all of the costs, by which an backend is chosen."""
    shutil.copytree(version._ROOT / "einlinear" / "ops", tmp_path / "ops")
    monkeypatch.setattr(version, "_ROOT", tmp_path)
    digest = version.code_digest.__wrapped__  # anew at every call
    seen = [digest("ops")]
    for name in ("costs.json", "kernel.cpp", "plan.py"):
        with (tmp_path / "ops" / name).open("a") as file:
            file.write("\n")
        seen.append(digest("ops"))
    (tmp_path / "ops" / "plan.py").rename(tmp_path / "ops" / "plans.py")
    seen.append(digest("ops"))
    (tmp_path / "ops" / "tiles.h").touch()
    seen.append(digest("ops"))
    assert len({*seen}) == len(seen)
    (tmp_path / "ops" / "notes.md").touch()
    assert digest("ops") == seen[-1]


def test_what_a_run_depends_on_is_there() -> None:
    assert all((version._ROOT / folder).is_dir() for folder in _DECISIVE)


def test_a_checkout_that_is_not_installed_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert runpy.run_path(version.__file__)["__version__"] == "0+checkout"
