"""Qualified names of modules, and globs on them, as `layers=`, `zero=`, `lr_scale=` and `roles=` take them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

T = TypeVar("T")

_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # by torch.compile, FSDP1, checkpoints


def plain_modules(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module by every qualified name it has, without what wrappers put into names, at whatever depth they are.

    A wrapper comes before what it wraps, under the same name.
    """
    yield name, model
    # a user's own layer may be called "module" too: only these two put it into names
    parallel = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
    for part, child in model._modules.items():
        if child is not None:
            wrapped = part in _WRAPPED or (parallel and part == "module")
            yield from plain_modules(child, name if wrapped else f"{name}.{part}".lstrip("."))


def name_of(model: nn.Module, module: nn.Module) -> str:
    """The first qualified name that a module has in a model."""
    return next(name for name, found in plain_modules(model) if found is module)


def as_globs(given: str | Sequence[str], argument: str) -> list[str]:
    """A glob, or several, as a list."""
    globs = [given] if isinstance(given, str) else given
    if not isinstance(globs, list | tuple) or not all(isinstance(glob, str) for glob in globs):
        raise TypeError(f"{argument} must be a glob such as '*.fc2', or a list of globs, not {given!r}")
    return list(globs)


def as_rules(given: Mapping[str, T] | None, argument: str) -> dict[str, T]:
    """A mapping from globs to anything, as a dict."""
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"{argument} must map globs such as '*.fc2' to values, not {given!r}")
    return dict(given or {})


def check_globs(globs: Iterable[str], names: Sequence[str], argument: str, what: str) -> None:
    """Raise ValueError for a glob that matches none of the names: it is misspelt."""
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            if not names:
                raise ValueError(f"{argument}: {glob!r} matches no {what}: there is none")
            near = difflib.get_close_matches(glob.strip("*."), dict.fromkeys(names), n=10, cutoff=0)
            raise ValueError(f"{argument}: {glob!r} matches no {what}; the nearest are {', '.join(near)}")
