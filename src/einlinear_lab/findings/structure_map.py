"""The map: where structures lie in (psi, nu, omega), and what each is worth at one compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from einlinear.structures import structure
from einlinear.structures.spec import is_family, parse_family
from einlinear_lab.findings.summary import Row, Study
from einlinear_lab.findings.taxonomy import EXPONENTS
from einlinear_lab.runs.models import DENSE, Model
from einlinear_lab.scaling import ExponentEffects, exponent_effects

AT_LEAST = 8  # structures
NEAR = 0.1  # how far from the compute of the map the MACs of its models may be


@dataclass(frozen=True)
class Place:
    """A model on the map.

    Attributes:
        row: its runs.
        kind: what its structure is called, see `kind_of`.
        exponents: of its structure, by name.
        loss: the mean over its seeds.
        is_on_front: whether no other model is both better and faster to train.
    """

    row: Row
    kind: str
    exponents: Mapping[str, float]
    loss: float
    is_on_front: bool = False

    @property
    def structure(self) -> str:
        return self.row.run.model.structure


@dataclass(frozen=True)
class StructureMap:
    """Models that cost about the same.

    Attributes:
        compute: MACs per input, their median.
        places: the best first.
        effects: of the exponents on the logarithm of the loss.
        unfinished: further structures of the same folders whose runs ended early, or are still running: the exponents.
    """

    compute: float
    places: tuple[Place, ...]
    effects: ExponentEffects
    unfinished: Mapping[str, Mapping[str, float]]


def structure_map(study: Study, measure: str) -> StructureMap | None:
    """The map of a study; None of fewer than eight structures of one compute, or where a loss is not positive.

    Models some of whose layers have a structure of their own are left out.
    """
    found: list[tuple[float, Row]] = []
    for curve in study.curves:
        if curve.options.get("structure_aware", True):
            rows = [row for row in curve.best if not getattr(row.run.model, "roles", {})]  # one structure for all
            found += [(mean, row) for row in rows if (mean := row.mean(measure)) is not None]
    if not found or min(loss for loss, _ in found) <= 0:
        return None
    compute = median(row.result.macs for _, row in found)
    near = [(loss, row) for loss, row in found if abs(row.result.macs / compute - 1) <= NEAR]
    if len({row.run.model.structure for _, row in near}) < AT_LEAST:
        return None
    places, fastest = [], float("inf")
    for loss, row in sorted(near, key=lambda own: own[0]):
        seconds = row.step_seconds
        is_on_front = seconds is not None and seconds < fastest
        fastest = min(fastest, seconds or fastest)
        if exponents := _exponents(row.run.model):
            places.append(Place(row, kind_of(row.run.model.structure), exponents, loss, is_on_front))
    if len(places) < AT_LEAST:
        return None
    reference = next((own.loss for own in places if own.structure == DENSE), median(own.loss for own in places))
    psi, nu, omega = ([own.exponents[name] for own in places] for name in ("psi", "nu", "omega"))
    effects = exponent_effects(psi, nu, omega, [own.loss for own in places], reference)
    return StructureMap(float(compute), tuple(places), effects, _unfinished(study, places))


def _exponents(model: Model) -> dict[str, float]:
    """Of the structure, by name; none if its family is not registered here."""
    try:
        s = structure(model.structure, model.width, model.expansion * model.width)
    except ValueError:
        return {}
    return {name: getattr(s, name) for name in EXPONENTS}


def _unfinished(study: Study, places: Sequence[Place]) -> dict[str, dict[str, float]]:
    folders = {record.folder.parent for own in places for record in own.row.records}
    models = [record.run.model for record in study.unfinished if record.folder.parent in folders]
    known = {own.structure for own in places}
    models = [model for model in models if not getattr(model, "roles", {}) and model.structure not in known]
    return {model.structure: exponents for model in models if (exponents := _exponents(model))}


def kind_of(spec: str) -> str:
    """What a structure is called: the family, and of a theta the best known one that it belongs to.

    >>> kind_of("einsum(theta=(1/2, 0, 1/2, 0, 1/2, 1/2, 0))"), kind_of("einsum(theta=(1, 0, 0, 0, 1, 0, 1/2))")
    ('BTT', 'low rank')
    >>> kind_of("monarch(blocks=4)"), kind_of("einsum(theta=(1/2, 1/4, 1/4, 1/4, 1/2, 1/4, 0))")
    ('monarch', 'other einsum')
    """
    if not is_family(spec):
        return "pattern"
    family, arguments = parse_family(spec)
    if family != "einsum":
        return family
    alpha, beta, gamma, delta, epsilon, phi, rho = arguments["theta"]
    if not (gamma or phi):
        if not (beta or delta):
            return "low rank"
        return "tensor train" if rho else "Kronecker"
    if not (beta or delta):
        return "BTT" if alpha + epsilon - rho <= 1 else "BTT of low rank"
    return "other einsum"
