"""Adapters of frozen linear layers, y = W x + scale * S x with a trainable structured S: add, merge, save and load."""

from einlinear.adapters.active_adapters import activate, disable, remove
from einlinear.adapters.adaptation import adapt
from einlinear.adapters.adaptation_report import Adaptation, AdaptationReport
from einlinear.adapters.adapted_linear import AdaptedLinear, Adapter
from einlinear.adapters.adapter_file import load, save
from einlinear.adapters.merging import merge, unmerge

__all__ = ["Adaptation", "AdaptationReport", "AdaptedLinear", "Adapter"]
__all__ += ["activate", "adapt", "disable", "load", "merge", "remove", "save", "unmerge"]
