"""Import hooks: functions that run once another module has been imported, called by a finder on `sys.meta_path`."""

import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_hooks: dict[str, list[Callable[[], None]]] = {}


def when_imported(module: str, hook: Callable[[], None]) -> None:
    """Call a function whenever a module is executed, and now if it is imported; with EINLINEAR_HOOKS=0 never."""
    if os.environ.get("EINLINEAR_HOOKS") == "0":
        return
    if module in sys.modules:
        hook()
    hooks = _hooks.setdefault(module, [])
    if hook not in hooks:
        hooks.append(hook)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _hooks:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                for hook in _hooks[name]:
                    hook()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
