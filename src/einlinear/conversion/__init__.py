"""Whole models: swap layers, project pretrained weights, go back to dense."""

from einlinear.conversion.layers import Conversion, ConversionReport, convert, densify

__all__ = ["Conversion", "ConversionReport", "convert", "densify"]
