"""Import of the user's code (--import), which registers families."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

# Modules and files that this process has imported.
_imported: list[str] = []


def import_all(targets: Sequence[str]) -> None:
    _imported[:] = targets
    for target in targets:
        import_user_code(target)


def setup() -> tuple[Callable[[], None], ...]:
    """Return functions that register the same families in another process."""
    return tuple(partial(import_user_code, target) for target in _imported)


def import_user_code(target: str) -> None:
    """Import a module by its name, or a file by its path; raise ValueError with the reason or a traceback."""
    if target.endswith(".py") and not Path(target).is_file():
        raise ValueError(f"--import {target}: there is no such file")
    try:
        if target.endswith(".py"):
            # Not the bare stem, which may be the name of another module.
            name = f"_imported_{Path(target).stem}"
            spec = spec_from_file_location(name, target)
            assert spec is not None
            assert spec.loader is not None
            # Dataclasses and pickle look modules up there.
            sys.modules[name] = module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        else:
            importlib.import_module(target)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{target}.".startswith(f"{error.name}."):
            why = "there is no such module; to import a file, give its path, which ends in .py"
        else:
            why = "".join(traceback.format_exception(error, limit=-2)).rstrip()
        raise ValueError(f"--import {target}: {why}") from None
