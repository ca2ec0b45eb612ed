"""What one parameter multiplies learning rate, weight decay and eps by: a pure function of its role and sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from einlinear.mup.factor_multipliers import (
    adam_multipliers,
    gradient_scales,
    muon_multipliers,
    muon_product_multipliers,
    sgd_multipliers,
    soap_multipliers,
    table_multipliers,
)
from einlinear.nn.layer_descriptions import ParameterRole
from einlinear.structures import Structure

# How an optimizer turns a gradient into an update: its size counts or not, or only the singular vectors of a matrix, or
# of a product of two factors. Updates of SOAP have the size of Adam's and the singular values of Muon's.
Rule: TypeAlias = Literal["adam", "sgd", "soap", "muon", "muon_product"]

DECAYS = ("independent", "coupled")
_OF_FACTORS: Mapping[str, Callable[[Structure], tuple[float, ...]]] = {
    "adam": adam_multipliers,
    "sgd": sgd_multipliers,
    "soap": soap_multipliers,
    "muon": muon_multipliers,
    "muon_product": muon_product_multipliers,
}


@dataclass(frozen=True)
class Growth:
    """How a parameter grew from the base model to the model that is trained.

    Attributes:
        shape, base_shape: of the parameter, [out_features, in_features] of the full weight for a matrix.
        depth: the number of layers like its own over that in the base; 1 outside of stacks of layers.
        alpha: exponent of the depth rule: branches of the model are multiplied by depth^-alpha.
    """

    shape: Sequence[int]
    base_shape: Sequence[int]
    depth: float = 1.0
    alpha: float = 1.0

    @property
    def is_empty(self) -> bool:
        # parameters without entries exist: DINOv3 has no register tokens by default
        return 0 in (*self.shape, *self.base_shape)

    @property
    def entries(self) -> float:
        return math.prod(self.shape) / math.prod(self.base_shape)


def lr_multiplier(role: ParameterRole, rule: Rule, growth: Growth, structure_aware: bool = True) -> float:
    """Return the learning rate over that of the base: by the width, the depth, and for factors the structure.

    Widths: Yang et al., arXiv 2203.03466, table 3, and arXiv 2310.17813, condition 1. Depths: Dey et al., arXiv
    2505.01618, for Adam depth^(alpha - 1); the gradients that SGD takes in full fall with the branch once more.
    """
    if role.is_scalar or growth.is_empty:
        return 1.0
    exponent = 2 * growth.alpha - 1 if rule == "sgd" else growth.alpha - 1
    depth: float = growth.depth**exponent
    if not role.is_matrix:
        table = depth * (growth.entries if rule == "sgd" else 1.0)
        if role.structure is None or not structure_aware:
            return table
        return table * table_multipliers(role.structure)[role.factor]
    (fan_out, fan_in), (base_out, base_in) = growth.shape, growth.base_shape
    aspect = (fan_out / fan_in) / (base_out / base_in)
    widths = {
        "adam": base_in / fan_in,
        "sgd": aspect,
        # n equal singular values have the root mean square 1 at sqrt(n)
        "soap": math.sqrt(aspect * max(growth.base_shape) / max(growth.shape)),
    }
    width = depth * widths.get(rule, math.sqrt(aspect))
    if role.structure is None or not structure_aware:
        return width
    return width * _OF_FACTORS[rule](role.structure)[role.factor]


def decay_multiplier(role: ParameterRole, decay: str, lr_multiplier: float) -> float:
    """Return the weight decay of a parameter over that of the argument; optimizers multiply it by the learning rate.

    "independent": in a step, every full matrix shrinks by lr * weight_decay, whatever its width and structure: each of
    the k factors of a term by a k-th of that. "coupled": by lr * lr_multiplier * weight_decay, every factor.
    """
    if role.kind == "vector":
        return 0.0
    if decay == "coupled" or lr_multiplier == 0:
        return 1.0
    return 1 / (lr_multiplier * _factors_of_term(role))


def eps_multiplier(role: ParameterRole, growth: Growth) -> float:
    """Return the size that gradients are expected to have over that in the base, to which Adam adds its eps.

    A gradient falls with the number of outputs, and in branches with their multiplier (arXiv 2505.01618, table 1). That
    of a factor is also larger or smaller than that of a dense matrix, see `gradient_scales`.
    """
    if role.is_scalar or growth.is_empty:
        return 1.0
    branch: float = growth.depth**-growth.alpha
    if not role.is_matrix:
        return branch / growth.entries
    size = branch * growth.base_shape[0] / growth.shape[0]
    return size if role.structure is None else size * gradient_scales(role.structure)[role.factor]


def _factors_of_term(role: ParameterRole) -> int:
    """Return the number of factors of the term that a parameter belongs to: 1 for a full matrix."""
    if role.structure is None:
        return 1
    sizes = [len(term.factors) for term in role.structure.terms for _ in term.factors]
    return sizes[role.factor]
