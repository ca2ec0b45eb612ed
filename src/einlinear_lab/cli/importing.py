"""Code of the user's, imported for the families that it registers."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_imported: list[str] = []  # by this process


def import_all(targets: Sequence[str]) -> None:
    """Import what --import names, one after the other; raises as `import_user_code`."""
    _imported[:] = targets
    for target in targets:
        import_user_code(target)


def setup() -> tuple[Callable[[], None], ...]:
    """What another process has to call, so that it knows the families that this one knows."""
    return tuple(partial(import_user_code, target) for target in _imported)


def import_user_code(target: str) -> None:
    """Import a module by its name, or a file by its path, which ends in .py.

    Raises:
        ValueError: there is no such module or file, or its own code raises; the message then shows where.
    """
    if target.endswith(".py") and not Path(target).is_file():
        raise ValueError(f"--import {target}: there is no such file")
    try:
        if target.endswith(".py"):
            _import_file(Path(target))
        else:
            importlib.import_module(target)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{target}.".startswith(f"{error.name}."):
            why = "there is no such module; to import a file, give its path, which ends in .py"
        else:
            why = "".join(traceback.format_exception(error, limit=-2)).rstrip()
        raise ValueError(f"--import {target}: {why}") from None


def _import_file(path: Path) -> None:
    name = f"_imported_{path.stem}"  # not the bare stem: a file may be called as a module that others import
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module_from_spec(spec)  # where dataclasses and pickle look it up
    spec.loader.exec_module(sys.modules[name])
