"""Globs on qualified names, as `layers=`, `zero=`, `lr_scale=` and `roles=` take them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

T = TypeVar("T")


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
            near = difflib.get_close_matches(glob.strip("*."), dict.fromkeys(names), n=10, cutoff=0)
            raise ValueError(f"{argument}: {glob!r} matches no {what}; the nearest are {', '.join(near) or 'none'}")
