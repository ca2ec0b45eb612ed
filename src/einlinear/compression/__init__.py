"""Compression of pretrained models: `compress` chooses and fits structures within a budget, `distill` trains them."""

from einlinear.compression.compression_report import (
    CompressedLayer,
    CompressionReport,
    DtypeAlone,
    MeasuredTime,
    QuantizationAlone,
)
from einlinear.compression.distillation import Distillation, distill
from einlinear.compression.pipeline import compress

__all__ = [
    "CompressedLayer",
    "CompressionReport",
    "Distillation",
    "DtypeAlone",
    "MeasuredTime",
    "QuantizationAlone",
    "compress",
    "distill",
]
