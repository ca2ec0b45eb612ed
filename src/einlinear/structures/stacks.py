"""Stacks of equal structures: several matrices of one input as one, whose factors have a leading axis more."""

from functools import lru_cache
from itertools import chain, count

from einlinear.structures.pattern import Pattern, TermPattern
from einlinear.structures.sizes import DoesNotFit
from einlinear.structures.spec import structure as make_structure
from einlinear.structures.structured_matrix import Structure


@lru_cache(maxsize=4096)
def stack(structure: Structure, layers: int) -> Structure:
    """Return the structure of several matrices of one structure on top of each other.

    Its factors are theirs, stacked along a new first axis: (layers, *shape). Its outputs are theirs one after the
    other: layers * out_features.

    Raises:
        DoesNotFit: outputs are padded, so that the padding of one matrix would lie between it and the next one.
        ValueError: the pattern or its sizes would be beyond the limits of structures.

    Example:
        >>> import einlinear as el
        >>> el.structures.stack(el.structure("btt", 64, 64), 3).spec
        '(g a), q g r f a, q f e g r -> (q f e) where g=8, a=8, r=1, f=8, e=8, q=3'
    """
    pattern, sizes = structure.pattern, dict(structure.sizes)
    if any(outputs for _, outputs in map(structure.padding, structure.terms)):
        raise DoesNotFit(f"{structure} has padded outputs, which cannot be stacked")
    axis = next(name for name in chain("q", (f"q{number}" for number in count(2))) if name not in sizes)

    def stacked(term: TermPattern) -> TermPattern:
        factors = tuple((axis, *axes) for axes in term.factors)
        return TermPattern(term.inputs, factors, (axis, *term.outputs))

    terms = tuple(stacked(term) for term in pattern.terms)
    text = str(Pattern(terms).with_sizes({**sizes, axis: layers}))
    return make_structure(text, structure.in_features, layers * structure.out_features)
