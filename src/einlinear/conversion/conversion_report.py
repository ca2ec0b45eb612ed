"""Report of `convert` and `densify`: every matched layer, and the share of the model's parameters they hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from einlinear.nn.layer_descriptions import CONVOLUTION, EMBEDDING, LINEAR, PACKED, RECURRENT, STRUCTURED, layer_info
from einlinear.nn.names import plain_modules
from einlinear.tables import aligned

_STACKS = "expert stacks and other 3-D weights"
_VECTORS = "biases, norms and other vectors"
_PLAIN = "other parameters"
# a tensor that several modules share counts under the first of its kinds
KINDS = (EMBEDDING, CONVOLUTION, RECURRENT, PACKED, _STACKS, STRUCTURED, LINEAR, _VECTORS, _PLAIN)


@dataclass(frozen=True)
class Unconsidered:
    """Parameters of one kind that were not considered, each tied tensor once.

    Attributes:
        kind: such as "convolutions".
        params: the number of parameters.
        names: qualified names of the modules that hold them, or of the parameters where a module holds several kinds.
    """

    kind: str
    params: int
    names: tuple[str, ...]

    def __str__(self) -> str:
        more = f" and {len(self.names) - 3} more" if len(self.names) > 3 else ""
        return f"{self.params:,} in {self.kind} ({', '.join(self.names[:3])}{more})"


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
        if self.share >= 0.5:
            return None
        largest = f": {self.others[0].params / self.params:.0%} are in {self.others[0].kind}" if self.others else ""
        return f"Warning: the layers considered hold only {self.share:.1%} of the model's parameters{largest}."

    @property
    def notes(self) -> list[str]:
        """One sentence on the share, and one on the parameters that were not considered."""
        counts = f"{self.considered:,} of the model's {self.params:,} parameters ({self.share:.1%})"
        others = [f"Not considered: {'; '.join(map(str, self.others))}."] if self.others else []
        return [f"The layers considered hold {counts}.", *others]


@dataclass(frozen=True)
class Conversion:
    """One converted layer.

    Attributes:
        name: its first qualified name.
        before, after: descriptions of the old and the new layer.
        params_before, params: parameters of the weight, including a router.
        macs_before, macs: multiply-accumulates of the weight for one input vector, including a router.
        error: of a projected weight, relative in Frobenius norm.
        starts_at_zero: whether the dense weight was zero, so that the structured one is zero, too.
    """

    name: str
    before: str
    after: str
    params_before: int
    params: int
    macs_before: int
    macs: int
    error: float | None = None
    starts_at_zero: bool = False


def total(layers: str, count: str) -> Any:
    """Return a property of a report: the sum of a count over its layers."""
    return property(lambda report: sum(getattr(layer, count) for layer in getattr(report, layers)))


@dataclass(frozen=True)
class ConversionReport:
    """Printable report of a conversion.

    Attributes:
        converted: the layers that were replaced.
        skipped: matched layers that were not replaced, as (name, reason).
        coverage: the share of the model's parameters in the replaced layers, and the kinds of the others; of `convert`.
        params_before, params, macs_before, macs: sums over the converted layers.
    """

    converted: tuple[Conversion, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    coverage: Coverage | None = None

    params_before, params = total("converted", "params_before"), total("converted", "params")
    macs_before, macs = total("converted", "macs_before"), total("converted", "macs")

    def __str__(self) -> str:
        rows = [("layer", "before", "after", "params", "MACs", "error")]
        sums = Conversion("total", "", "", self.params_before, self.params, self.macs_before, self.macs)
        for c in (*self.converted, sums):
            error = "" if c.error is None else f"{c.error:.3g}"
            params, macs = f"{c.params_before:,} -> {c.params:,}", f"{c.macs_before:,} -> {c.macs:,}"
            rows.append((c.name, c.before, c.after, params, macs, error))
        lines = [*aligned(rows), *(f"skipped {name}: {reason}" for name, reason in self.skipped)]
        if zero := [c.name for c in self.converted if c.starts_at_zero]:
            lines.append(f"These weights were zero and still are, and biases were kept: {', '.join(zero)}.")
        if self.coverage is not None:
            lines = [*filter(None, [self.coverage.warning]), *lines, *self.coverage.notes]
        return "\n".join(lines)


def measure_coverage(model: nn.Module, layers: Iterable[nn.Module]) -> Coverage:
    """Measure the share of a model's parameters in the weights of some layers, and sort the others by kind."""
    # of experts, all parameters are weights
    weights = [[layer.weight] if hasattr(layer, "weight") else layer.parameters() for layer in layers]
    considered = {id(weight) for group in weights for weight in group}
    sizes: dict[int, int] = {}
    # by the id of the tensor: the rank of its kind, and a name
    places: dict[int, tuple[int, str]] = {}
    for module_name, module, name, parameter in _owned(model):
        sizes[id(parameter)] = math.prod(_shape(parameter))
        kind = _kind(module, name, parameter)
        full = f"{module_name}.{name}".strip(".")
        place = KINDS.index(kind), full if kind in (PACKED, _STACKS, _VECTORS, _PLAIN) else module_name or full
        places[id(parameter)] = min(places.get(id(parameter), place), place, key=lambda ranked: ranked[0])
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
    module: Any
    for module_name, module in plain_modules(model, remove_duplicate=True):
        if id(module) in inside:
            continue
        below = [module, *(module.parametrizations.modules() if is_parametrized(module) else ())]
        inside |= {id(other) for other in below[1:]}
        for other in below:
            for name, parameter in other.named_parameters(recurse=False, remove_duplicate=False):
                yield module_name, module, name, parameter


def _kind(module: nn.Module, name: str, parameter: Any) -> str:
    info, shape = layer_info(module), _shape(parameter)
    category = info.category if info is not None else ""
    if category == RECURRENT or (category == STRUCTURED and name != "bias"):
        return category
    if category == STRUCTURED or sum(size > 1 for size in shape) < 2:
        return _VECTORS
    # neither nn.Bilinear nor a position embedding (1, tokens, features) is a stack of matrices
    is_stack = len(shape) > 2 and shape[0] > 1 and not type(module).__module__.startswith("torch.")
    return category or (_STACKS if is_stack else _PLAIN)


def _shape(parameter: Any) -> tuple[int, ...]:
    """Return the full shape, also of a parameter that DeepSpeed has partitioned over processes; (0,) of a lazy one."""
    return (0,) if is_lazy(parameter) else tuple(getattr(parameter, "ds_shape", parameter.shape))
