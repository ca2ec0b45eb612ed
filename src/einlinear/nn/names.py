"""Qualified names of modules, and globs on them, as `layers=`, `zero=`, `lr_scale=` and `roles=` take them."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

T = TypeVar("T")

# what torch.compile, FSDP1 and activation checkpointing put into names
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# the same of peft, by the classes that do so: of models with adapters, of methods, and of layers with adapters
_OF_PEFT = {
    "base_model": ("PeftModel", "PeftMixedModel"),
    "model": ("BaseTuner",),
    "base_layer": ("BaseTunerLayer",),
}


def plain_modules(model: nn.Module, remove_duplicate: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Iterate like `named_modules` over names without prefixes of wrappers, by default over all names of a module.

    A wrapper comes before the module of the same name that it wraps.
    """
    seen = set[int]()
    for name, _, module in _walk(model, "", ""):
        if not remove_duplicate or id(module) not in seen:
            seen.add(id(module))
            yield name, module


def full_names(model: nn.Module) -> dict[str, str]:
    """Return the names of modules that `get_submodule` takes, by those without prefixes of wrappers."""
    return {name: full for name, full, _ in _walk(model, "", "")}


def _walk(model: nn.Module, name: str, full: str) -> Iterator[tuple[str, str, nn.Module]]:
    yield name, full, model
    for part, child in model._modules.items():
        if child is not None:
            below = name if _is_wrapped(model, part) else f"{name}.{part}".lstrip(".")
            yield from _walk(child, below, f"{full}.{part}".lstrip("."))


def _is_wrapped(parent: nn.Module, part: str) -> bool:
    # a user's own layer may be called "module" or "model" too
    if part == "module":
        return isinstance(parent, nn.parallel.DistributedDataParallel | nn.DataParallel)
    return part in _WRAPPED or is_of_peft(parent, *_OF_PEFT.get(part, ()))


def is_of_peft(module: nn.Module, *names: str) -> bool:
    """Return whether a module is of a class of peft with one of these names, or of a subclass."""
    classes = type(module).__mro__ if names else ()
    return any(c.__name__ in names and c.__module__.startswith("peft.") for c in classes)


def name_of(model: nn.Module, module: nn.Module) -> str:
    """Return the first qualified name that a module has in a model."""
    return next(name for name, other in plain_modules(model) if other is module)


def as_globs(value: str | Sequence[str], argument: str) -> list[str]:
    """Return a glob, or several, as a list; TypeError for anything else."""
    globs = [value] if isinstance(value, str) else value
    if not isinstance(globs, list | tuple) or not all(isinstance(glob, str) for glob in globs):
        raise TypeError(f"{argument} must be a glob such as '*.fc2', or a list of globs, not {value!r}")
    return list(globs)


def matching(modules: Mapping[str, T], globs: str | Sequence[str] | None, argument: str, noun: str) -> dict[str, T]:
    """Return the modules whose qualified names a glob matches, or one of several; None matches all.

    Globs (fnmatch) match whole names: "*.attn.*" matches "blocks.0.attn.q" but not "attn.q"; "*attn.*" matches both.

    Raises:
        ValueError: a glob that matches none of them.
        TypeError: globs that are not text.
    """
    if globs is None:
        return dict(modules)
    globs = as_globs(globs, argument)
    check_globs(globs, [*modules], argument, noun)
    return {name: module for name, module in modules.items() if matches_any(name, globs)}


def as_rules(value: Mapping[str, T] | None, argument: str) -> dict[str, T]:
    """Return a mapping from globs to values as a dict; TypeError for anything else."""
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{argument} must map globs such as '*.fc2' to values, not {value!r}")
    return dict(value or {})


def matches_any(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def check_globs(globs: Iterable[str], names: Sequence[str], argument: str, noun: str) -> None:
    """Raise ValueError for a glob that matches none of the names: it is misspelt."""
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            near = ", ".join(difflib.get_close_matches(glob.strip("*."), dict.fromkeys(names), n=10, cutoff=0))
            hint = f"; the nearest are {near}" if names else ": the model has none"
            raise ValueError(f"{argument}: {glob!r} matches no {noun}{hint}")
