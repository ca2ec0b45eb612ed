"""Groups for Muon in which the two factors of a term move together, as `einlinear.mup.Muon` describes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from einlinear.mup.parameter_roles import Parameter, factor_view
from einlinear.structures.structured_matrix import Factor, Term


def product_of(p: Parameter) -> dict[str, Any]:
    """Return what a group of products has: the views of both factors of the term of `p`. Empty for a full matrix.

    Raises:
        ValueError: a term of three or more factors.
    """
    term = _term(p)
    if term is None or len(term.factors) == 1:
        return {}
    if len(term.factors) > 2:
        advice = "Leave the layer to AdamW with hidden=, or give product=False"
        raise ValueError(f"product=True takes terms of two factors; {p.name} belongs to one of more. {advice}")
    return {
        "matrix_view": tuple(factor_view(factor) for factor in term.factors),
        "gram_views": tuple(_gram_view(factor, term) for factor in term.factors),
    }


def product_shapes(p: Parameter) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of all factors of the term of `p`, the same for each of them."""
    term = _term(p)
    if term is None:
        return (p.shape,)
    stack = p.shape[: len(p.shape) - len(_factor(p).axes)]
    return tuple(stack + factor.shape for factor in term.factors)


def check_pairs(groups: Iterable[Mapping[str, Any]], params: Sequence[Parameter]) -> None:
    """Raise ValueError unless first and second factors of the same term alternate in groups of products."""
    by_id = {id(p.tensor): p for p in params}
    for group in groups:
        if "gram_views" not in group:
            continue
        members = [by_id[id(tensor)] for tensor in group["params"]]
        for i, p in enumerate(members):
            # the first factor of its term is at an even place
            partner = members[i ^ 1] if i ^ 1 < len(members) else None
            is_pair = partner is not None and (partner.key, _term(partner)) == (p.key, _term(p))
            term = _term(p)
            if not is_pair or term is None or term.factors[i % 2] != _factor(p):
                why = "hidden= and lr_scale= must treat both alike, and neither can be shared alone"
                raise ValueError(f"product=True moves the two factors of a term together, not {p.name} alone: {why}")


def _gram_view(factor: Factor, term: Term) -> tuple[tuple[int, ...], int, int]:
    """Return order, rows (inner axes) and columns (axes of this factor alone); the other axes are batch axes."""
    first, second = term.factors
    shared = [axis for axis in first.axes if axis in second.axes]
    inner = [axis for axis in shared if axis not in (*term.inputs, *term.outputs)]
    own = [axis for axis in factor.axes if axis not in shared]
    batch = [axis for axis in shared if axis not in inner]
    sizes = dict(zip(factor.axes, factor.shape, strict=True))
    rows, columns = (math.prod(sizes[axis] for axis in axes) for axes in (inner, own))
    return tuple(factor.axes.index(axis) for axis in (*batch, *inner, *own)), rows, columns


def _factor(p: Parameter) -> Factor:
    assert p.role.structure is not None
    return p.role.structure.factors[p.role.factor]


def _term(p: Parameter) -> Term | None:
    structure = p.role.structure
    if structure is None:
        return None
    return next(term for term in structure.terms if _factor(p) in term.factors)
