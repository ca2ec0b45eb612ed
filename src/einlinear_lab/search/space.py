"""The continuous space of structures: every two-factor einsum, as a point of a cube, and a few families beside it.

A two-factor einsum is a vector theta of seven exponents (arXiv 2410.02117, section 2). Five numbers between 0 and 1
give one: how much of the input only the first factor reads (alpha), how much of the output only the second writes
(epsilon), which share of the rest of each side the other factor takes alone (beta, delta) and which it shares with the
first (gamma, phi), and the rank between the two (rho). So the constraints hold by construction:

- each side's exponents are at least 0 and sum to 1;
- of two labellings of the same matrices, with the factors exchanged, it is the one that is cheaper to contract in the
  order it is written in: min(alpha, epsilon) >= min(beta, delta);
- no rank is larger than what it connects: rho <= min(alpha, epsilon);
- both factors sum something, or it were a dense layer in disguise: alpha, epsilon > 0.

The structures that are known best lie on the faces of this space, where exponents are 0 or 1: a part of the cube of
positive volume is mapped to each face, so that samplers find them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from einlinear_lab.models.blocks import ROLES

GRID = 24  # exponents are multiples of 1/24, such as halves, thirds and quarters: a factor of 1.26 at width 256
_FACE = 0.2  # share of a coordinate that is mapped to each of its ends

Suggest = Callable[[str], float]  # a coordinate between 0 and 1, by name


@dataclass(frozen=True)
class Theta:
    """The exponents of the axes of a two-factor einsum, as fractions.

    Attributes:
        alpha, beta, gamma: of the axes of the input that only the first factor reads, only the second, both.
        delta, epsilon, phi: of the axes of the output that only the first writes, only the second, both.
        rho: of the rank between them.

    >>> monarch = Theta(*(Fraction(n, 2) for n in (1, 0, 1, 0, 1, 1)), Fraction(0))
    >>> monarch.spec
    'einsum(theta=(1/2, 0, 1/2, 0, 1/2, 1/2, 0))'
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
        """The structure, as text."""
        exponents = self.alpha, self.beta, self.gamma, self.delta, self.epsilon, self.phi, self.rho
        return f"einsum(theta=({', '.join(map(str, exponents))}))"


# What the literature knows (arXiv 2410.02117): a choice that differs in psi, nu and omega.
KNOWN = tuple(
    Theta(*(Fraction(n, 12) for n in exponents))
    for exponents in (
        (6, 0, 6, 0, 6, 6, 0),  # BTT
        (12, 0, 0, 0, 12, 0, 6),  # low rank
        (6, 6, 0, 6, 6, 0, 0),  # Kronecker
        (6, 0, 6, 0, 6, 6, 3),  # BTT of a higher rank
        (6, 3, 3, 3, 6, 3, 0),  # none of these
        (12, 0, 0, 0, 12, 0, 9),  # low rank of a higher rank
        (6, 6, 0, 6, 6, 0, 3),  # tensor train
        (8, 0, 4, 0, 8, 4, 0),  # BTT of low rank
    )
)


def theta_of(alpha: float, epsilon: float, beta: float, delta: float, rho: float) -> Theta:
    """The admissible theta of a point of the cube: all are between 0 and 1, and any will do.

    >>> theta_of(0.4, 0.4, 0.0, 0.0, 0.0).spec
    'einsum(theta=(1/2, 0, 1/2, 0, 1/2, 1/2, 0))'
    >>> theta_of(1.0, 1.0, 0.3, 0.9, 0.6).spec  # nothing is left of either side: low rank
    'einsum(theta=(1, 0, 0, 0, 1, 0, 1/2))'
    """
    a, e = (max(_on_grid(_to_faces(u, low=False), Fraction(1)), Fraction(1, GRID)) for u in (alpha, epsilon))
    b, d = _on_grid(_to_faces(beta), 1 - a), _on_grid(_to_faces(delta), 1 - e)
    if min(a, e) < min(b, d):
        a, b, d, e = b, a, e, d
    r = _on_grid(_to_faces(rho, high=False), min(a, e))
    return Theta(a, b, 1 - a - b, d, e, 1 - d - e, r)


def point_of(theta: Theta) -> dict[str, float]:
    """The coordinates of an admissible theta, by name.

    >>> point = point_of(KNOWN[0])
    >>> theta_of(**point).spec
    'einsum(theta=(1/2, 0, 1/2, 0, 1/2, 1/2, 0))'
    """
    return {
        "alpha": _from_faces(theta.alpha, Fraction(1), low=False),
        "epsilon": _from_faces(theta.epsilon, Fraction(1), low=False),
        "beta": _from_faces(theta.beta, 1 - theta.alpha),
        "delta": _from_faces(theta.delta, 1 - theta.epsilon),
        "rho": _from_faces(theta.rho, min(theta.alpha, theta.epsilon), high=False),
    }


def _to_faces(u: float, low: bool = True, high: bool = True) -> float:
    """Stretched, so that a part of the coordinate is mapped to its ends."""
    first, last = _FACE * low, 1 - _FACE * high
    return min(1.0, max(0.0, (u - first) / (last - first)))


def _from_faces(exponent: Fraction, of: Fraction, low: bool = True, high: bool = True) -> float:
    """The coordinate that is stretched to an exponent."""
    first, last = _FACE * low, 1 - _FACE * high
    return first + float(exponent / of if of else exponent) * (last - first)


def _on_grid(share: float, of: Fraction) -> Fraction:
    return Fraction(round(share * float(of) * GRID), GRID)


@dataclass(frozen=True)
class Proposal:
    """A structure whose size is still open.

    Attributes:
        family: "einsum", one of `BESIDE`, or any structure of which all is said, as text.
        theta: of an einsum.
        arguments: of another family.
        rho: the rank, as an exponent of the width; None where there is none to choose.
    """

    family: str
    theta: Theta | None = None
    arguments: tuple[tuple[str, object], ...] = ()
    rho: Fraction | None = None

    @property
    def ranks(self) -> list[Fraction]:
        """The exponents that the rank may have, by how near they are to the one proposed."""
        if self.rho is None:
            return [Fraction(0)]
        most = min(self.theta.alpha, self.theta.epsilon) if self.theta else Fraction(1)
        wanted = self.rho
        return sorted(
            (Fraction(n, GRID) for n in range(int(most * GRID) + 1)), key=lambda own: (abs(own - wanted), own)
        )

    def spec(self, rho: Fraction, width: int) -> str:
        """As text, with a rank of width**rho."""
        if self.theta is not None:
            t = self.theta
            return Theta(t.alpha, t.beta, t.gamma, t.delta, t.epsilon, t.phi, rho).spec
        arguments = dict(self.arguments)
        if self.rho is not None:
            arguments["rank"] = max(1, round(width ** float(rho)))
        written = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        return f"{self.family}({written})" if written else self.family


STRUCTURE = "structure"
Proposals = Mapping[str, Proposal]  # by the option of the model that it is for: "structure", "up_structure", ...

# Families that are no two-factor einsums: how a point of the cube chooses a member.
BESIDE: Mapping[str, Callable[[Suggest], Proposal]] = {
    "btt3": lambda suggest: Proposal(
        "btt", arguments=(("cores", 3),), rho=_on_grid(_to_faces(suggest("rho"), high=False), Fraction(1, 2))
    ),
    "blast": lambda suggest: Proposal(
        "blast", arguments=(("blocks", _whole(suggest("blocks"), 2, 8)),), rho=_on_grid(suggest("rho"), Fraction(1))
    ),
    "dyad": lambda suggest: Proposal(
        "dyad",
        arguments=(
            ("blocks", _whole(suggest("blocks"), 2, 8)),
            ("variant", ("it", "ot", "dt")[_whole(suggest("variant"), 0, 2)]),
        ),
    ),
}


def option_of(role: str) -> str:
    """The option of a model for the structure of a role."""
    return f"{role}_{STRUCTURE}"


def _whole(u: float, low: int, high: int) -> int:
    """A whole number from low to high."""
    return min(high, low + int(u * (high + 1 - low)))


@dataclass(frozen=True)
class Space:
    """What is searched.

    Attributes:
        families: "einsum" for all of theta, and any of `BESIDE`.
        roles: of linear layers that get a structure of their own.
    """

    families: tuple[str, ...] = ("einsum",)
    roles: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = ("einsum", *BESIDE)
        unknown = [name for name in self.families if name not in known]
        if unknown or not self.families:
            raise ValueError(f"families must be some of {', '.join(known)}, not {', '.join(unknown) or 'none'}")
        if wrong := [role for role in self.roles if role not in ROLES]:
            raise ValueError(f"roles must be some of {', '.join(ROLES)}, not {', '.join(wrong)}")

    @property
    def known(self) -> list[dict[str, float]]:
        """The points at which all layers have a structure of the literature; none without einsums."""
        if "einsum" not in self.families:
            return []
        family = (self.families.index("einsum") + 0.5) / len(self.families)
        points = [{"family": family, **point_of(theta)} for theta in KNOWN]
        return [
            {(f"{role} {name}" if role else name): u for role in ("", *self.roles) for name, u in point.items()}
            for point in points
        ]

    def propose(self, suggest: Suggest) -> Proposals:
        """The structures at a point, whose coordinates are asked for one by one."""
        own = {
            option_of(role): self._propose(lambda name, role=role: suggest(f"{role} {name}"))  # type: ignore[misc]
            for role in self.roles
        }
        return {STRUCTURE: self._propose(suggest), **own}

    def _propose(self, suggest: Suggest) -> Proposal:
        family = (
            self.families[_whole(suggest("family"), 0, len(self.families) - 1)]
            if self.families[1:]
            else self.families[0]
        )
        if family != "einsum":
            return BESIDE[family](lambda name: suggest(f"{family} {name}"))
        theta = theta_of(*(suggest(name) for name in ("alpha", "epsilon", "beta", "delta", "rho")))
        return Proposal("einsum", theta, rho=theta.rho)
