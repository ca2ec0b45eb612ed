"""Conversion of the layers of any model: to structured ones, new or projected, back to dense, and to fused blocks."""

from einlinear.conversion.conversion import convert, densify
from einlinear.conversion.conversion_report import Conversion, ConversionReport, Coverage, Unconsidered
from einlinear.conversion.fusing import fuse, unfuse
from einlinear.conversion.fusion_report import FusedBlock, FusionReport

__all__ = ["Conversion", "ConversionReport", "Coverage", "Unconsidered", "convert", "densify"]
__all__ += ["FusedBlock", "FusionReport", "fuse", "unfuse"]
