"""Parsing of options by name, from command lines and files, into config dataclasses."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, TypeVar, cast, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from einlinear.structures.families import did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

_OF_COMMANDS = ("out", "workers", "on", "mix_code", "storage", "budget", "trials")
# Cached, as making an adapter takes longer than parsing a thousand options.
_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)
_hints: Callable[[type], dict[str, Any]] = cache(get_type_hints)


def names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def parse(kind: type[T], options: Mapping[str, Any]) -> T:
    """Make a dataclass from options or texts: "3e-3" becomes 0.003, "0.9,0.99" a tuple, "none" None."""
    values = {name: None if value == "none" else value for name, value in options.items()}
    for name, value in values.items():
        if isinstance(value, str) and get_origin(_hints(kind).get(name)) is tuple:
            values[name] = value.split(",")
    try:
        return cast(T, _adapter(kind).validate_python(values))
    except ValidationError as error:
        raise ValueError("; ".join(map(_message, error.errors()))) from None


def parse_strictly(kind: type[T], content: Any) -> T:
    """Make a dataclass from JSON values of exactly its types; texts are not converted. Raises ValueError for others."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds {json.dumps(content)[:40]}, not an object")
    refuse_unknown(content, names(kind), "it")
    try:
        return cast(T, _adapter(kind).validate_json(json.dumps(content), strict=True))
    except ValidationError as error:
        raise ValueError("; ".join(map(_message, error.errors()))) from None


def from_text(text: str, source: str, kind: str = "toml") -> dict[str, Any]:
    """Parse a text in TOML or JSON. Raises ValueError if the text is damaged."""
    try:
        content: dict[str, Any] = json.loads(text) if kind == "json" else tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"{source} cannot be read: {error}") from None
    return content


def refuse_unknown(options: Iterable[str], allowed: Iterable[str], owner: str) -> None:
    """Raise ValueError, with the nearest name, if an option is not allowed."""
    allowed = list(allowed)
    for name in (name for name in options if name not in allowed):
        hint = f".{did_you_mean(name, allowed)} Its options are {', '.join(allowed)}"
        if name in _OF_COMMANDS:
            hint = f": if the command has it, write --{name.replace('_', '-')} before its value"
        raise ValueError(f"{owner} has no option {name!r}{hint}")


def _message(error: Any) -> str:
    """Return an error in one line; errors of the dataclass itself stay the same."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return f"{where} must be given"
    what = error["msg"].removeprefix("Input ")
    return f"{where} {what}, not {repr(error['input'])[:200]}"
