"""What a structured matrix is: patterns, named families, sizes, counts, exponents. Pure Python, no tensors.

pattern.py    the language: text -> Pattern
sizes.py      which integers the axes measure
counts.py     contraction order, MACs, exponents, generic rank
structure.py  Structure: all of it together, at one size
families.py   the named families, one function each
budget.py     the richest member that a budget of MACs allows
spec.py       "btt(rank=2)" or a pattern -> Structure
mup.py        structure-aware muP as numbers
"""

from einlinear.structures.families import FAMILIES, register_family
from einlinear.structures.pattern import PatternError
from einlinear.structures.sizes import DoesNotFit
from einlinear.structures.spec import structure
from einlinear.structures.structure import Factor, Structure, Term

__all__ = ["FAMILIES", "DoesNotFit", "Factor", "PatternError", "Structure", "Term", "register_family", "structure"]
