"""Whole models: swap layers, project pretrained weights, go back to dense."""

from einlinear.conversion.convert import convert
from einlinear.conversion.coverage import Coverage, Unconsidered
from einlinear.conversion.densify import densify
from einlinear.conversion.report import Conversion, ConversionReport

__all__ = ["Conversion", "ConversionReport", "Coverage", "Unconsidered", "convert", "densify"]
