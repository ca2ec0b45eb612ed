"""How much of a model a conversion or compression considers, and what kinds of parameters it does not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from einlinear.nn.foreign import Described, is_conv1d

_NAMED = 3  # names of each kind that are printed
_HALF = 0.5  # of the model's parameters: below it, the report warns

# in the order in which a tensor that several modules share is attributed to one of them
_EMBEDDINGS = "embeddings"
_CONVOLUTIONS = "convolutions"
_RECURRENT = "recurrent layers"
_PACKED = "packed attention projections"
_STACKS = "expert stacks and other 3-D weights"
_STRUCTURED = "structured layers"
_LINEAR = "other linear layers"
_VECTORS = "biases, norms and other vectors"
_PLAIN = "other parameters"
KINDS = (_EMBEDDINGS, _CONVOLUTIONS, _RECURRENT, _PACKED, _STACKS, _STRUCTURED, _LINEAR, _VECTORS, _PLAIN)


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
    """The share of a model's parameters that was considered, and what was not.

    Attributes:
        params: of the whole model, each tied tensor once.
        considered: the number of parameters in the weights of the layers that were considered.
        others: what was not considered, by kind, the largest number of parameters first.
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
        """A sentence if less than half of the model's parameters was considered, to be printed first."""
        if self.share >= _HALF:
            return None
        largest = f": {self.others[0].params / self.params:.0%} are in {self.others[0].kind}" if self.others else ""
        return f"Warning: the layers considered hold only {self.share:.1%} of the model's parameters{largest}."

    @property
    def notes(self) -> list[str]:
        """The share, and what was not considered, one sentence each."""
        counts = f"{self.considered:,} of the model's {self.params:,} parameters"
        lines = [f"The layers considered hold {counts} ({self.share:.1%})."]
        if self.others:
            lines.append(f"Not considered: {'; '.join(map(str, self.others))}.")
        return lines


def measure_coverage(model: nn.Module, layers: Iterable[nn.Module]) -> Coverage:
    """Measure which share of a model's parameters the weights of some of its layers are, and sort the others by kind.

    Args:
        model: any module, before its layers are replaced.
        layers: those of its linear layers that are considered; only their `weight` counts.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 10))
        >>> coverage = measure_coverage(model, [model[2]])
        >>> round(coverage.share, 2), [(other.kind, other.params, other.names) for other in coverage.others]
        (0.25, [('convolutions', 216, ('0',)), ('biases, norms and other vectors', 18, ('0.bias', '2.bias'))])
    """
    considered = {id(layer.weight) for layer in layers}
    sizes: dict[int, int] = {}
    found: dict[int, tuple[int, str]] = {}  # by the tensor: the rank of its kind, and a name
    for module_name, module, name, parameter in _owned(model):
        sizes[id(parameter)] = _size(parameter)
        kind = _kind(module, name, parameter)
        full = f"{module_name}.{name}".strip(".")
        shown = full if kind in (_PACKED, _STACKS, _VECTORS, _PLAIN) else module_name or full
        place = (KINDS.index(kind), shown)
        if id(parameter) not in found or place[0] < found[id(parameter)][0]:
            found[id(parameter)] = place
    others = []
    for rank, kind in enumerate(KINDS):
        own = {key: name for key, (other, name) in found.items() if other == rank and key not in considered}
        if params := sum(sizes[key] for key in own):
            others.append(Unconsidered(kind, params, tuple(dict.fromkeys(own.values()))))
    others.sort(key=lambda other: -other.params)
    return Coverage(sum(sizes.values()), sum(sizes.get(key, 0) for key in considered), tuple(others))


def _owned(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Any]]:
    """Every parameter with the module that computes with it: that of a parametrization is the parametrized one."""
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
    # a parameter that is partitioned over processes by DeepSpeed keeps its whole shape there
    shape: tuple[int, ...] = getattr(parameter, "ds_shape", () if is_lazy(parameter) else parameter.shape)
    if isinstance(module, Described):
        return _VECTORS if name == "bias" else _STRUCTURED
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return _RECURRENT
    if sum(size > 1 for size in shape) < 2:
        return _VECTORS
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return _EMBEDDINGS
    if isinstance(module, nn.modules.conv._ConvNd):
        return _CONVOLUTIONS
    if isinstance(module, nn.MultiheadAttention):
        return _PACKED
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return _LINEAR
    # neither nn.Bilinear nor a position embedding (1, tokens, features) is a stack of matrices
    is_stack = len(shape) > 2 and shape[0] > 1 and not type(module).__module__.startswith("torch.")
    return _STACKS if is_stack else _PLAIN


def _size(parameter: Any) -> int:
    """Entries; of a parameter that is partitioned over processes, of the whole of it."""
    size: int = 0 if is_lazy(parameter) else getattr(parameter, "ds_numel", parameter.numel())
    return size
