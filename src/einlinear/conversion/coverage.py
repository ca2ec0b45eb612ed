"""Coverage: the share of a model that a conversion or compression considers, and the kinds of other parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from einlinear.nn.layer_kinds import CONVOLUTION, EMBEDDING, LINEAR, PACKED, RECURRENT, STRUCTURED, layer_info

# the number of names of each kind that are printed
_NAMED = 3
# the report warns below this share of the model's parameters
_HALF = 0.5

_STACKS = "expert stacks and other 3-D weights"
_VECTORS = "biases, norms and other vectors"
_PLAIN = "other parameters"
# a tensor that several modules share counts under the first of its kinds
KINDS = (EMBEDDING, CONVOLUTION, RECURRENT, PACKED, _STACKS, STRUCTURED, LINEAR, _VECTORS, _PLAIN)


@dataclass(frozen=True)
class Unconsidered:
    """Parameters of one kind that were not considered.

    Attributes:
        kind: one of `KINDS`, such as "convolutions".
        params: the number of parameters, each tied tensor once.
        names: qualified names of the modules that hold them, or of the parameters where a module holds several kinds.
    """

    kind: str
    params: int
    names: tuple[str, ...]

    def __str__(self) -> str:
        more = len(self.names) - _NAMED
        names = ", ".join(self.names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
        return f"{self.params:,} in {self.kind} ({names})"


@dataclass(frozen=True)
class Coverage:
    """Share of a model's parameters that was considered, and the kinds of the others.

    Attributes:
        params: of the whole model, each tied tensor once.
        considered: the number of parameters in the weights of the layers that were considered.
        others: the parameters that were not considered, by kind, the largest number first.
    """

    params: int
    considered: int
    others: tuple[Unconsidered, ...]

    @property
    def share(self) -> float:
        """The fraction of the model's parameters that was considered."""
        return self.considered / self.params if self.params else 0.0

    @property
    def warning(self) -> str | None:
        """A sentence to print first if less than half of the model's parameters was considered, or None."""
        if self.share >= _HALF:
            return None
        largest = f": {self.others[0].params / self.params:.0%} are in {self.others[0].kind}" if self.others else ""
        return f"Warning: the layers considered hold only {self.share:.1%} of the model's parameters{largest}."

    @property
    def notes(self) -> list[str]:
        """One sentence on the share, and one on the parameters that were not considered."""
        counts = f"{self.considered:,} of the model's {self.params:,} parameters"
        lines = [f"The layers considered hold {counts} ({self.share:.1%})."]
        if self.others:
            lines.append(f"Not considered: {'; '.join(map(str, self.others))}.")
        return lines


def measure_coverage(model: nn.Module, layers: Iterable[nn.Module]) -> Coverage:
    """Measure the share of a model's parameters in the weights of some of its layers, and sort the others by kind.

    Args:
        model: any module, before its layers are replaced.
        layers: the linear layers that are considered; only their `weight` counts.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 10))
        >>> coverage = measure_coverage(model, [model[2]])
        >>> round(coverage.share, 2), [(other.kind, other.params, other.names) for other in coverage.others]
        (0.25, [('convolutions', 216, ('0',)), ('biases, norms and other vectors', 18, ('0.bias', '2.bias'))])
    """
    considered = {id(layer.weight) for layer in layers}
    sizes: dict[int, int] = {}
    # by the id of the tensor: the rank of its kind, and a name
    places: dict[int, tuple[int, str]] = {}
    for module_name, module, name, parameter in _owned(model):
        sizes[id(parameter)] = math.prod(_shape(parameter))
        kind = _kind(module, name, parameter)
        full = f"{module_name}.{name}".strip(".")
        shown = full if kind in (PACKED, _STACKS, _VECTORS, _PLAIN) else module_name or full
        rank = KINDS.index(kind)
        if id(parameter) not in places or rank < places[id(parameter)][0]:
            places[id(parameter)] = rank, shown
    others = []
    for rank, kind in enumerate(KINDS):
        names = {key: name for key, (other, name) in places.items() if other == rank and key not in considered}
        if params := sum(sizes[key] for key in names):
            others.append(Unconsidered(kind, params, tuple(dict.fromkeys(names.values()))))
    others.sort(key=lambda other: -other.params)
    return Coverage(sum(sizes.values()), sum(sizes.get(key, 0) for key in considered), tuple(others))


def _owned(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Any]]:
    """Iterate over parameters with the module that computes with them: for a parametrization the parametrized one."""
    inside = set[int]()
    for module_name, module in model.named_modules():
        if id(module) in inside:
            continue
        below = [module]
        if is_parametrized(module):
            below += module.parametrizations.modules()
            inside |= {id(other) for other in below[1:]}
        for other in below:
            for name, parameter in other.named_parameters(recurse=False, remove_duplicate=False):
                yield module_name, module, name, parameter


def _kind(module: nn.Module, name: str, parameter: Any) -> str:
    """Return the kind of a parameter, one of `KINDS`."""
    info = layer_info(module)
    category = info.category if info is not None else ""
    if category == STRUCTURED:
        return _VECTORS if name == "bias" else STRUCTURED
    if category == RECURRENT:
        return RECURRENT
    shape = _shape(parameter)
    if sum(size > 1 for size in shape) < 2:
        return _VECTORS
    if category:
        return category
    # neither nn.Bilinear nor a position embedding (1, tokens, features) is a stack of matrices
    is_stack = len(shape) > 2 and shape[0] > 1 and not type(module).__module__.startswith("torch.")
    return _STACKS if is_stack else _PLAIN


def _shape(parameter: Any) -> tuple[int, ...]:
    """Return the full shape, also of a parameter that DeepSpeed has partitioned over processes; (0,) of a lazy one."""
    return (0,) if is_lazy(parameter) else tuple(getattr(parameter, "ds_shape", parameter.shape))
