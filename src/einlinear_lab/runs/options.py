"""From options by name, as command lines and files have them, to checked settings; what is wrong is said by name."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, TypeVar, cast, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

_OF_COMMANDS = ("out", "workers", "on", "mix_code", "storage", "budget", "trials")  # options of commands, not of runs

_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)  # making one takes longer than a thousand options

_hints: Callable[[type], dict[str, Any]] = cache(get_type_hints)


def names(kind: type) -> tuple[str, ...]:
    """The options of a dataclass."""
    return tuple(field.name for field in dataclasses.fields(kind))


def parse(kind: type[T], options: Mapping[str, Any]) -> T:
    """A dataclass from its options. Texts become what the field is: "3e-3" a number, "0.9,0.99" a tuple, "none" None.

    Raises:
        ValueError: a value of the wrong type, one that the dataclass refuses, or an option that is missing.
    """
    values = {name: None if value == "none" else value for name, value in options.items()}
    for name, value in values.items():
        if isinstance(value, str) and get_origin(_hints(kind).get(name)) is tuple:
            values[name] = value.split(",")
    try:
        return cast(T, _adapter(kind).validate_python(values))
    except ValidationError as error:
        raise ValueError("; ".join(map(_message, error.errors()))) from None


def parse_strictly(kind: type[T], content: Any) -> T:
    """A dataclass from JSON values that are what its fields are; texts do not become numbers.

    Raises:
        ValueError: no object, a value of the wrong type, one that is missing or unknown.
    """
    if not isinstance(content, dict):
        raise ValueError(f"it holds {json.dumps(content)[:40]}, not an object")
    refuse_unknown(content, names(kind), "it")
    try:
        return cast(T, _adapter(kind).validate_json(json.dumps(content), strict=True))
    except ValidationError as error:
        raise ValueError("; ".join(map(_message, error.errors()))) from None


def from_text(text: str, what: str, kind: str = "toml") -> dict[str, Any]:
    """The tables of a text in TOML, or the objects of one in JSON. Raises ValueError if it is damaged."""
    try:
        content: dict[str, Any] = json.loads(text) if kind == "json" else tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"{what} cannot be read: {error}") from None
    return content


def refuse_unknown(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise ValueError if an option is none of those that are known."""
    known = list(known)
    for name in given:
        if name in known:
            continue
        if name in _OF_COMMANDS:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{what} has no option {name!r}: if the command has it, write {option} before its value")
        raise ValueError(f"{what} has no option {name!r}: {nearest(name, known)}It has {', '.join(known)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """A question that names the most similar of those that are known; empty where none is."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def _message(error: Any) -> str:
    """One of pydantic's errors in a line; what the dataclass itself raised stays as it is."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return f"{where} must be given"
    what = error["msg"].removeprefix("Input ")
    return f"{where} {what}, not {repr(error['input'])[:200]}"
