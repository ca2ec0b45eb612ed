"""Description of a layer: the muP role of each parameter, and the MACs.

Layers of this library describe themselves (`SelfDescribing`); `third_party.py` describes those of torch and
transformers. muP, conversion and MAC counting all read these descriptions, so a new kind of layer is described once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import nn

from einlinear.structures import Structure

RoleKind: TypeAlias = Literal["input", "hidden", "output", "vector", "unknown"]


@dataclass(frozen=True)
class Role:
    """Role of a parameter in muP (Yang et al., arXiv 2203.03466, table 3).

    A layer cannot know which of its sizes grow with the width of the model, so a plain linear layer is always "hidden".
    The rules of input and output matrices follow from its shape in the base model.

    Attributes:
        kind: "input" for a table whose rows are looked up or added, such as an embedding; "hidden" for a matrix, or a
            factor of a structured one; "output" for a matrix with a fixed number of outputs, such as a router;
            "vector" for biases, norms and scales. "unknown" for parameters without a description.
        in_features, out_features: of the full matrix, for "hidden" and "output".
        structure, factor: the structure of the matrix, and the index of the parameter in `structure.factors`. The
            parameter may stack such factors along a first axis.
        stacked: whether the parameter stacks several dense matrices along a first axis.
        shares_input_with: name of a weight that has the same input, for routers: a base model without experts has that
            weight alone. Routers start at zero.
        is_scalar: whether a "vector" scales a full matrix, so that the base model may lack it.
    """

    kind: RoleKind
    in_features: int = 0
    out_features: int = 0
    structure: Structure | None = None
    factor: int = 0
    stacked: bool = False
    shares_input_with: str | None = None
    is_scalar: bool = False

    @property
    def is_matrix(self) -> bool:
        return self.kind in ("hidden", "output")


INPUT, VECTOR, SCALAR, UNKNOWN = Role("input"), Role("vector"), Role("vector", is_scalar=True), Role("unknown")


@dataclass(frozen=True)
class LayerInfo:
    """Description of a module without its children.

    Attributes:
        roles: the roles of its parameters, by name.
        macs: multiply-accumulates for one token; None if they depend on more than the module.
        macs_per_position: multiply-accumulates for each pair of tokens of a sequence, as in attention.
        category: the kind of layer, in the words of conversion reports.
    """

    roles: Mapping[str, Role] = field(default_factory=dict)
    macs: int | None = 0
    macs_per_position: int = 0
    category: str = ""


class SelfDescribing(nn.Module, ABC):
    """Module that describes itself. A base class, since wrappers forward attributes and would count twice."""

    @abstractmethod
    def layer_info(self) -> LayerInfo:
        """Return the description of this module without its children."""
