"""The base model: the shape of each parameter in it, also if it has fewer layers, fewer experts, or dense ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from torch import nn

from einlinear.mup.parameter_roles import Parameter, RoleGlobs, parameters

Shapes: TypeAlias = Mapping[str, Sequence[int]]
Base: TypeAlias = "nn.Module | Shapes | str | Path | None"


def base_shapes(model: nn.Module, roles: RoleGlobs = None) -> dict[str, list[int]]:
    """Return the shapes of a base model by name, to be saved as JSON: [out, in] for structured layers and experts.

    >>> import einlinear as el
    >>> el.base_shapes(el.Linear(64, 256, "btt"))
    {'weight': [256, 64], 'bias': [256]}
    """
    return {p.key: p.full_shape for p in parameters(model, roles)}


def load_shapes(base: nn.Module | Shapes | str | Path, roles: RoleGlobs) -> dict[str, Sequence[int]]:
    """Return the shapes of a base model, given it, its shapes, or the path of a JSON file of them."""
    if isinstance(base, nn.Module):
        return {**base_shapes(base, roles)}
    if isinstance(base, Mapping):
        return dict(base)
    if isinstance(base, str | Path):
        if not Path(base).is_file():
            raise FileNotFoundError(f"base: there is no file {str(base)!r}, which holds el.base_shapes(model) as JSON")
        try:
            shapes: dict[str, Sequence[int]] = json.loads(Path(base).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"base: {str(base)!r} is not the JSON of el.base_shapes: {error}") from None
        return shapes
    raise TypeError(f"base must be a model, a mapping of shapes, the path of a JSON file or None, not {base!r}")


def find_shapes(params: Sequence[Parameter], base: Shapes) -> dict[str, Sequence[int]]:
    """Return the shape in the base of each parameter, by its key.

    Raises:
        ValueError: the base lacks a parameter, or has it with another number of dimensions.
    """
    shapes = dict(base)
    for p in params:
        # gammas and the like learn at the base rate whether the base has them or not
        if not p.role.is_scalar:
            shapes[p.key] = _find_shape(p, shapes, base)
    return shapes


def _find_shape(p: Parameter, shapes: Shapes, base: Shapes) -> Sequence[int]:
    if p.key not in shapes and p.role.shares_input_with and p.role.shares_input_with in shapes:
        # a base without experts has no router
        return [p.full_shape[0], shapes[p.role.shares_input_with][1]]
    # the base may have the tensor by another of its names, or fewer layers
    shape = next((shapes[name] for name in (p.key, *p.names) if name in shapes), None)
    if shape is None:
        of_layers = {name: base[name] for pattern in _patterns(p.key) for name in base if pattern in _patterns(name)}
        if not of_layers:
            raise ValueError(
                f"the base has no {p.key!r}: it must be the same model at another width or depth, with equal names"
            )
        shape = next(iter(of_layers.values()))
        if different := [name for name, other in of_layers.items() if list(other) != list(shape)]:
            raise ValueError(
                f"the base has no {p.key!r}, and the layers of its depth differ: {next(iter(of_layers))!r} has shape "
                f"{list(shape)}, {different[0]!r} {list(of_layers[different[0]])}. Give a base of the same depth"
            )
    if len(shape) != len(p.full_shape):
        raise ValueError(f"{p.key!r} has shape {p.full_shape}, but {list(shape)} in the base")
    return shape


def depth_ratios(keys: Iterable[str], base: Iterable[str]) -> dict[str, float]:
    """Return, for each key, how many times as many layers like its own there are as in the base.

    >>> depth_ratios(["head.weight", "blocks.0.weight", "blocks.1.weight"], ["head.weight", "blocks.0.weight"])
    {'head.weight': 1.0, 'blocks.0.weight': 2.0, 'blocks.1.weight': 2.0}
    """
    keys = list(keys)
    here, there = (Counter(pattern for name in names for pattern in _patterns(name)) for names in (keys, base))
    ratios = {}
    for key in keys:
        ratios[key] = 1.0
        for pattern in _patterns(key):
            if there[pattern]:
                ratios[key] *= here[pattern] / there[pattern]
    return ratios


def _patterns(name: str) -> Iterator[str]:
    """Yield the name with each of its numbers, such as that of a layer, left open."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            yield ".".join((*parts[:i], "*", *parts[i + 1 :]))
