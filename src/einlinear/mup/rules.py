"""Rules of structure-aware muP: hyperparameters and initialisation of a parameter as pure functions of its role.

A dense matrix learns at base_in / in of the base model's rate under Adam, and a factor of a structured matrix at that
times its own multiplier (Yang et al., arXiv 2203.03466; Qiu et al., arXiv 2406.06248, section 3). The numbers for a
single structure are in `structures/scales.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from einlinear.nn.layer_info import Role
from einlinear.structures.scales import adam_multipliers, init_std, muon_multipliers, sgd_multipliers, spectral_std

Rule: TypeAlias = Literal["adam", "sgd", "muon"]

_FACTOR_MULTIPLIERS = {"adam": adam_multipliers, "sgd": sgd_multipliers, "muon": muon_multipliers}


@dataclass(frozen=True)
class Hyperparameters:
    """Hyperparameters of one parameter.

    Attributes:
        lr_multiplier: its learning rate over that of the base model.
        weight_decay: as the optimizer takes it; None for the optimizer's default.
        eps: as the optimizer takes it; None for the optimizer's default.
    """

    lr_multiplier: float
    weight_decay: float | None = None
    eps: float | None = None


def hyperparameters(
    role: Role,
    rule: Rule,
    shape: Sequence[int],
    base_shape: Sequence[int],
    weight_decay: float | None = None,
    eps: float | None = None,
    structure_aware: bool = True,
) -> Hyperparameters:
    """Return the hyperparameters of a parameter from its role and the kind of optimizer.

    Matrices and tables decay by `weight_decay` as it is, vectors do not decay. Adam gets `eps` as it is.

    Args:
        role: of the parameter.
        rule: "adam" for optimizers whose update does not depend on the size of the gradient, "sgd" or "muon".
        shape: (out_features, in_features) of the full matrix for a matrix or factor, else the parameter's shape.
        base_shape: the same in the base model.
        weight_decay, eps: of the base model.
        structure_aware: False gives a factor the multiplier of a dense matrix.

    >>> hyperparameters(Role("hidden", 256, 256), "adam", (256, 256), (64, 64), weight_decay=0.1)
    Hyperparameters(lr_multiplier=0.25, weight_decay=0.1, eps=None)
    """
    multiplier = _lr_multiplier(role, rule, shape, base_shape, structure_aware)
    return Hyperparameters(multiplier, 0.0 if role.kind == "vector" else weight_decay, eps if rule == "adam" else None)


def _lr_multiplier(
    role: Role, rule: Rule, shape: Sequence[int], base_shape: Sequence[int], structure_aware: bool
) -> float:
    # parameters without entries exist: DINOv3 has no register tokens by default
    if role.is_scalar or 0 in (*shape, *base_shape):
        return 1.0
    if not role.is_matrix:
        return math.prod(shape) / math.prod(base_shape) if rule == "sgd" else 1.0
    (fan_out, fan_in), (base_out, base_in) = shape, base_shape
    aspect = (fan_out / fan_in) / (base_out / base_in)
    width = {"adam": base_in / fan_in, "sgd": aspect, "muon": math.sqrt(aspect)}[rule]
    if role.structure is None or not structure_aware:
        return width
    return width * _FACTOR_MULTIPLIERS[rule](role.structure)[role.factor]


def initial_std(role: Role) -> float:
    """Return the standard deviation of a matrix, or of a factor, at initialisation."""
    if role.structure is not None:
        return init_std(role.structure)[role.factor]
    return spectral_std(role.in_features, role.out_features)
