"""Descriptions of structured matrices: patterns, named families, sizes, counts, exponents. Pure Python, no tensors.

spec.py               structure(): from a spec, "btt(rank=2)" or a pattern, to a Structure
pattern.py            the pattern language: from text to a Pattern
families.py           the named families, one function each
arguments.py          the arguments of a family, as text and as values
structured_matrix.py  Structure, Term and Factor
sizes.py              integer sizes of the axes
contraction.py        order of contraction, intermediates, MACs, exponents
rank.py               generic rank
budget.py             the richest structure within a budget of MACs
scales.py             initialisation and learning-rate scales of the factors (structure-aware muP)
limits.py             upper limits that keep hostile text from taking long
"""

from einlinear.structures.families import FAMILIES, Family, register_family
from einlinear.structures.pattern import PatternError
from einlinear.structures.sizes import DoesNotFit
from einlinear.structures.spec import structure
from einlinear.structures.structured_matrix import Factor, Structure, Term

__all__ = [
    "FAMILIES",
    "DoesNotFit",
    "Factor",
    "Family",
    "PatternError",
    "Structure",
    "Term",
    "register_family",
    "structure",
]
