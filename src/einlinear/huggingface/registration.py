"""Tells transformers of this library when both are there, whichever of the two is imported first.

Importing transformers takes seconds, and it may not be installed. So `import einlinear` does not import it: where it is
not there yet, the moment is awaited.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register() -> None:
    """Extend what was imported of transformers now, and the rest as soon as it is."""
    for name, extend in _AWAITED.items():
        if name in sys.modules:
            extend()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _extend_registry() -> None:
    from transformers.quantizers import auto

    from einlinear.huggingface.description import METHOD
    from einlinear.huggingface.quantizer import EinlinearConfig, EinlinearQuantizer

    if METHOD not in auto.AUTO_QUANTIZER_MAPPING and hasattr(auto, "register_quantizer"):  # old versions have none
        auto.register_quantization_config(METHOD)(EinlinearConfig)
        auto.register_quantizer(METHOD)(EinlinearQuantizer)


def _extend_configs() -> None:
    from einlinear.huggingface.parts import extend_get_config_dict

    extend_get_config_dict()


def _extend_models() -> None:
    from einlinear.huggingface.saving import extend_save_pretrained

    extend_save_pretrained()


_AWAITED: dict[str, Callable[[], None]] = {
    "transformers.configuration_utils": _extend_configs,
    "transformers.quantizers.auto": _extend_registry,
    "transformers.modeling_utils": _extend_models,
}


class _Finder(MetaPathFinder):
    """Finds the awaited modules as the others would, and extends them once they have been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _AWAITED:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _AWAITED[fullname]()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
