"""The space of structures: admissible by construction, and with everything of the papers in it."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.samplers import RandomSampler

import einlinear as el
from einlinear_lab.search.space import GRID, LITERATURE, STRUCTURE, Proposal, SearchSpace, Theta, point_of, theta_of

UNIT = st.floats(0, 1)
# (1/2, 1/4, ...) in 24ths: those of the papers, beside dense
PUBLISHED = [
    (24, 0, 0, 0, 24, 0, 12),  # low rank
    (24, 0, 0, 0, 24, 0, 18),
    (12, 12, 0, 12, 12, 0, 0),  # Kronecker
    (12, 12, 0, 12, 12, 0, 6),  # tensor train
    (16, 8, 0, 6, 18, 0, 0),  # uneven, the cheaper factor first
    (12, 0, 12, 0, 12, 12, 0),  # Monarch
    (12, 0, 12, 0, 12, 12, 6),  # BTT
    (8, 0, 16, 0, 16, 8, 6),
    (18, 0, 6, 0, 6, 18, 0),
    (16, 0, 8, 0, 16, 8, 0),  # of low rank
    (12, 6, 6, 6, 12, 6, 6),  # generic
]


def is_admissible(theta: Theta) -> bool:
    """Whether it is neither the dearer labelling of another nor of a rank that nothing can fill."""
    least = min(theta.alpha, theta.epsilon)
    return least > 0 and least >= min(theta.beta, theta.delta) and theta.rho <= least


def exponents_of(t: Theta) -> tuple[Fraction, Fraction, Fraction]:
    """psi, nu and omega, by hand."""
    psi = min(Fraction(1), 2 + t.rho - t.alpha - t.epsilon)
    nu = 1 + t.rho - min(t.alpha, t.epsilon)
    omega = min(t.alpha + t.delta, t.beta + t.epsilon) - min(t.alpha, t.epsilon)
    return psi, nu, omega


@given(UNIT, UNIT, UNIT, UNIT, UNIT)
@settings(max_examples=300)
def test_every_point_is_admissible(alpha: float, epsilon: float, beta: float, delta: float, rho: float) -> None:
    theta = theta_of(alpha, epsilon, beta, delta, rho)
    assert is_admissible(theta)
    sides = (theta.alpha, theta.beta, theta.gamma), (theta.delta, theta.epsilon, theta.phi)
    assert all(sum(side) == 1 and min(side) >= 0 for side in sides)
    assert 0 <= theta.rho <= min(theta.alpha, theta.epsilon)
    other = Theta(theta.beta, theta.alpha, theta.gamma, theta.epsilon, theta.delta, theta.phi, theta.rho)
    same_cost = min(theta.alpha, theta.epsilon) == min(theta.beta, theta.delta)
    assert other == theta or same_cost or not is_admissible(other)  # the factors exchanged: the same matrices
    s = el.structure(theta.spec, 256, 256)
    assert (s.psi, s.nu, s.omega) == pytest.approx(tuple(map(float, exponents_of(theta))))
    assert all(0 <= exponent <= 1 for exponent in exponents_of(theta))


@pytest.mark.parametrize("exponents", PUBLISHED)
def test_the_papers_thetas_are_points(exponents: tuple[int, ...]) -> None:
    wanted = Theta(*(Fraction(n, GRID) for n in exponents))
    assert is_admissible(wanted)
    point = point_of(wanted)
    assert all(0 <= u <= 1 for u in point.values())
    assert theta_of(**point) == wanted


def test_the_structures_of_the_literature() -> None:
    assert not SearchSpace(("dyad",)).literature
    for space in (SearchSpace(), SearchSpace(("blast", "einsum"), roles=("up",))):
        found = [space.propose(point) for point in space.literature]
        assert [{own.theta for own in proposals.values()} for proposals in found] == [
            {theta} for theta in LITERATURE.values()
        ]


def test_faces_have_a_volume() -> None:
    points = [n / 10 for n in range(11)]
    thetas = [theta_of(*point) for point in product(points, repeat=4) for point in [(*point, 0.1)]]
    assert sum(exponents_of(t)[2] == 0 for t in thetas) > len(thetas) / 4
    assert sum(t.alpha == t.epsilon == 1 for t in thetas) > len(thetas) / 50
    assert all(t.rho == 0 for t in thetas)


def test_families_beside_theta() -> None:
    space = SearchSpace(("einsum", "btt3", "blast", "dyad"))
    study = optuna.create_study(sampler=RandomSampler(0))
    families = set()
    for _ in range(40):
        proposal = space.propose(study.ask(space.coordinates).params)[STRUCTURE]
        for rho in proposal.ranks[:3]:
            s = el.structure(proposal.spec(rho, 64), 64, 64)
            families.add(s.spec.partition("(")[0])
    assert families == {"einsum", "btt", "blast", "dyad"}
    with pytest.raises(ValueError, match="families must be some of einsum, btt3, blast, dyad, not monarch"):
        SearchSpace(("monarch",))
    with pytest.raises(ValueError, match="not none"):
        SearchSpace(())


def test_ranks_stay_admissible() -> None:
    theta = theta_of(0.3, 0.7, 0.5, 0.5, 0.4)
    ranks = Proposal("einsum", theta, rho=theta.rho).ranks
    assert ranks[0] == theta.rho
    assert max(ranks) == min(theta.alpha, theta.epsilon)
    assert [abs(rho - theta.rho) for rho in ranks] == sorted(abs(rho - theta.rho) for rho in ranks)
