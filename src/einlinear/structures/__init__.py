"""Structured matrices as plain numbers and names, without tensors: patterns, families, sizes, counts and exponents."""

from einlinear.structures.families import FAMILIES, Family, register_family
from einlinear.structures.pattern import PatternError
from einlinear.structures.sizes import DoesNotFit
from einlinear.structures.spec import structure
from einlinear.structures.stacks import stack
from einlinear.structures.structured_matrix import Factor, Structure, Term

__all__ = ["FAMILIES", "DoesNotFit", "Factor", "Family", "PatternError", "Structure", "Term"]
__all__ += ["register_family", "stack", "structure"]
