"""Code that runs once another module has been imported.

Some modules take seconds to import and may not be installed, such as transformers. `import einlinear` does not import
them: it leaves a hook, which runs when somebody else does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_hooks: dict[str, list[Callable[[], None]]] = {}


def when_imported(module: str, hook: Callable[[], None]) -> None:
    """Call a function after every execution of a module, and now if the module is imported already."""
    hooks = _hooks.setdefault(module, [])
    if hook not in hooks:
        hooks.append(hook)
    if module in sys.modules:
        hook()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the modules as the other finders would, and calls the hooks once these modules have been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _hooks:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                for hook in _hooks[fullname]:
                    hook()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
