"""Pretrained models made smaller: which layer becomes what, within a budget, so that outputs change least.

select.py       which layers
running.py      the model on calibration data, and the inputs of its layers on the way
passes.py       the same again and again, without what is finished
moments.py      what is kept of these inputs
effects.py      what an error of a layer's outputs does to the model's, measured
divergence.py   how far answers are apart, a few tokens at a time
calibration.py  all of that for one model
candidates.py   what a layer could become, with the errors
allocation.py   what each layer becomes, within the budget
compress.py     `compress`
journal.py      what it has found so far, on disk
report.py       what it did
speed.py        how fast layers and models are
pretrained.py   models of transformers in folders, and text for them
distill.py         `distill`: training the compressed model to do what the original does
"""

from einlinear.compression.compression_report import Compressed, CompressionReport
from einlinear.compression.distillation import Distillation, distill
from einlinear.compression.pipeline import compress

__all__ = ["Compressed", "CompressionReport", "Distillation", "compress", "distill"]
