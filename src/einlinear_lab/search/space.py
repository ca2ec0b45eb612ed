"""The search space: every two-factor einsum as a point of a cube, and a few other families.

A part of the cube of positive volume is mapped to each face, where the best-known structures lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from einlinear_lab.models.config import ROLES

# Exponents are multiples of 1/24, such as halves, thirds and quarters: a factor of 1.26 at width 256.
GRID = 24
# The share of a coordinate that is mapped to each of its ends.
_FACE = 0.2

# The coordinates of a point by name, for example those of an Optuna trial.
Point = Mapping[str, Any]


@dataclass(frozen=True)
class Theta:
    """Exponents of the axes of a two-factor einsum, as fractions (arXiv 2410.02117, section 2).

    Attributes:
        alpha, beta, gamma: of the input axes that only the first factor, only the second factor, and both have.
        delta, epsilon, phi: of the output axes that only the first factor, only the second factor, and both have.
        rho: of the rank between the factors.
    """

    alpha: Fraction
    beta: Fraction
    gamma: Fraction
    delta: Fraction
    epsilon: Fraction
    phi: Fraction
    rho: Fraction

    @property
    def spec(self) -> str:
        return f"einsum(theta=({', '.join(map(str, vars(self).values()))}))"


# Structures of arXiv 2410.02117 that differ in psi, nu and omega. A search is warm-started with them, in this order.
LITERATURE = {
    name: Theta(*(Fraction(n, 12) for n in exponents))
    for name, exponents in {
        "BTT": (6, 0, 6, 0, 6, 6, 0),
        "low rank": (12, 0, 0, 0, 12, 0, 6),
        "Kronecker": (6, 6, 0, 6, 6, 0, 0),
        "BTT of a higher rank": (6, 0, 6, 0, 6, 6, 3),
        "generic": (6, 3, 3, 3, 6, 3, 0),
        "low rank of a higher rank": (12, 0, 0, 0, 12, 0, 9),
        "tensor train": (6, 6, 0, 6, 6, 0, 3),
        "BTT of low rank": (8, 0, 4, 0, 8, 4, 0),
    }.items()
}


def theta_of(alpha: float, epsilon: float, beta: float, delta: float, rho: float) -> Theta:
    """Return the theta of a point of the cube; beta and delta are shares of what alpha and epsilon leave.

    >>> theta_of(0.4, 0.4, 0.0, 0.0, 0.0).spec
    'einsum(theta=(1/2, 0, 1/2, 0, 1/2, 1/2, 0))'
    """
    # both factors contract an axis, otherwise the layer would be dense
    a, e = (max(_on_grid(_to_faces(u, low=False)), Fraction(1, GRID)) for u in (alpha, epsilon))
    b, d = _on_grid(_to_faces(beta), 1 - a), _on_grid(_to_faces(delta), 1 - e)
    # of two labellings of the same matrices, the one whose written order is cheaper to contract
    if min(a, e) < min(b, d):
        a, b, d, e = b, a, e, d
    r = _on_grid(_to_faces(rho, high=False), min(a, e))
    return Theta(a, b, 1 - a - b, d, e, 1 - d - e, r)


def point_of(theta: Theta) -> dict[str, float]:
    """Return the coordinates of an admissible theta by name; `theta_of` inverts it."""
    return {
        "alpha": _from_faces(theta.alpha, low=False),
        "epsilon": _from_faces(theta.epsilon, low=False),
        "beta": _from_faces(theta.beta, 1 - theta.alpha),
        "delta": _from_faces(theta.delta, 1 - theta.epsilon),
        "rho": _from_faces(theta.rho, min(theta.alpha, theta.epsilon), high=False),
    }


def _to_faces(u: float, low: bool = True, high: bool = True) -> float:
    """Stretch a coordinate, so that a part of it is mapped to each end."""
    first, last = _FACE * low, 1 - _FACE * high
    return min(1.0, max(0.0, (u - first) / (last - first)))


def _from_faces(exponent: Fraction, scale: Fraction = Fraction(1), low: bool = True, high: bool = True) -> float:
    """Invert `_to_faces` for an exponent between 0 and `scale`."""
    first, last = _FACE * low, 1 - _FACE * high
    return first + float(exponent / scale if scale else exponent) * (last - first)


def _on_grid(share: float, scale: Fraction = Fraction(1)) -> Fraction:
    return Fraction(round(share * float(scale) * GRID), GRID)


@dataclass(frozen=True)
class Proposal:
    """A structure whose rank still depends on the width: an einsum's theta, a family and arguments, or a complete spec.

    Attributes:
        rho: the rank as an exponent of the width; None where there is no rank to choose.
    """

    family: str
    theta: Theta | None = None
    arguments: Mapping[str, object] = field(default_factory=dict)
    rho: Fraction | None = None

    @property
    def ranks(self) -> list[Fraction]:
        """All admissible exponents of the rank, those nearest to `rho` first."""
        if self.rho is None:
            return [Fraction(0)]
        largest = min(self.theta.alpha, self.theta.epsilon) if self.theta else Fraction(1)
        rho = self.rho
        return sorted((Fraction(n, GRID) for n in range(int(largest * GRID) + 1)), key=lambda r: (abs(r - rho), r))

    def spec(self, rho: Fraction, width: int) -> str:
        """Return the structure as text, with a rank of width**rho."""
        if self.theta is not None:
            return replace(self.theta, rho=rho).spec
        arguments = dict(self.arguments)
        if self.rho is not None:
            arguments["rank"] = max(1, round(width ** float(rho)))
        text = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        return f"{self.family}({text})" if text else self.family


STRUCTURE = "structure"
# By the option of the model: "structure", "up_structure", ...
Proposals = Mapping[str, Proposal]

_UNIT, _BLOCKS = FloatDistribution(0, 1), IntDistribution(2, 8)
_COORDINATES: dict[str, dict[str, BaseDistribution]] = {
    "einsum": dict.fromkeys(("alpha", "epsilon", "beta", "delta", "rho"), _UNIT),
    "btt3": {"rho": _UNIT},
    "blast": {"blocks": _BLOCKS, "rho": _UNIT},
    "dyad": {"blocks": _BLOCKS, "variant": CategoricalDistribution(("it", "ot", "dt"))},
}


def option_of(role: str) -> str:
    return f"{role}_{STRUCTURE}"


@dataclass(frozen=True)
class SearchSpace:
    """The structures that a search chooses from.

    Attributes:
        families: some of "einsum" (every theta), "btt3" (block tensor trains of three cores), "blast" and "dyad".
        roles: of linear layers that get a structure of their own, besides the one of all others: "attention_in",
            "attention_out", "up", "down".
    """

    families: tuple[str, ...] = ("einsum",)
    roles: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = [name for name in self.families if name not in _COORDINATES]
        if unknown or not self.families:
            raise ValueError(f"families must be some of {', '.join(_COORDINATES)}, not {', '.join(unknown) or 'none'}")
        if unknown := [role for role in self.roles if role not in ROLES]:
            raise ValueError(f"roles must be some of {', '.join(ROLES)}, not {', '.join(unknown)}")

    @property
    def coordinates(self) -> dict[str, BaseDistribution]:
        """The coordinates by name. Every point has all of them: Gaussian processes need a fixed space."""
        names: dict[str, BaseDistribution] = {}
        if self.families[1:]:
            names["family"] = CategoricalDistribution(self.families)
        for family in self.families:
            names |= _COORDINATES[family]
        return {_of_role(role, name): kind for role in ("", *self.roles) for name, kind in names.items()}

    @property
    def literature(self) -> list[dict[str, Any]]:
        """The points at which all layers share a structure of `LITERATURE`; none without einsums."""
        if "einsum" not in self.families:
            return []
        roles, family = ("", *self.roles), {"family": "einsum"} if self.families[1:] else {}
        points = [family | point_of(theta) for theta in LITERATURE.values()]
        return [{_of_role(role, name): value for role in roles for name, value in point.items()} for point in points]

    def propose(self, point: Point) -> dict[str, Proposal]:
        """Return the structures at a point, by the option of the model."""
        options = {STRUCTURE: ""} | {option_of(role): role for role in self.roles}
        return {option: self._proposal(point, role) for option, role in options.items()}

    def _proposal(self, point: Point, role: str) -> Proposal:
        family = point[_of_role(role, "family")] if self.families[1:] else self.families[0]
        values = {name: point[_of_role(role, name)] for name in _COORDINATES[family]}
        if family == "einsum":
            theta = theta_of(**values)
            return Proposal("einsum", theta, rho=theta.rho)
        if family == "btt3":
            three_cores = _on_grid(_to_faces(values["rho"], high=False), Fraction(1, 2))
            return Proposal("btt", arguments={"cores": 3}, rho=three_cores)
        rho = _on_grid(values.pop("rho")) if "rho" in values else None
        return Proposal(family, arguments=values, rho=rho)


def _of_role(role: str, name: str) -> str:
    return f"{role} {name}" if role else name
