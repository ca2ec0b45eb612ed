"""Compression of pretrained models: `compress` chooses and fits structures within a budget, `distill` trains them.

pipeline.py            `compress`: calibrate, measure sensitivity, allocate, fit
selection.py           the layers to compress
calibration.py         statistics of the layers' inputs
second_moments.py      those statistics, and the errors that follow from them
sensitivity.py         how much an error of each layer changes the model's output
candidates.py          structures for each layer, with their errors
allocation.py          the choice of one candidate per layer
fitting.py             the new layers
compression_report.py  the result
distillation.py        `distill`: training the compressed model towards the original
resume_cache.py        results on disk
activations.py         inputs and outputs of layers
tracing.py             how the model's output depends on its layers
passes.py              forward passes that skip finished blocks
kl_divergence.py       distance between two models' predictions
timing.py              speed of layers
"""

from einlinear.compression.compression_report import CompressedLayer, CompressionReport
from einlinear.compression.distillation import Distillation, distill
from einlinear.compression.pipeline import compress

__all__ = ["CompressedLayer", "CompressionReport", "Distillation", "compress", "distill"]
