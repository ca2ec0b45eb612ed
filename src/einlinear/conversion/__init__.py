"""Conversion of the layers of any model: to structured ones, new or projected, and back to dense."""

from einlinear.conversion.conversion import convert, densify
from einlinear.conversion.conversion_report import Conversion, ConversionReport, Coverage, Unconsidered

__all__ = ["Conversion", "ConversionReport", "Coverage", "Unconsidered", "convert", "densify"]
