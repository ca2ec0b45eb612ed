"""Fusion of the feed-forward blocks of any model: `fuse` traces the blocks, hooks let them run fused.

`einlinear.FeedForward` runs fused by itself, without these.
"""

from einlinear.fusion.fuse_model import fuse, unfuse
from einlinear.fusion.fusion_report import FusedBlock, FusionReport

__all__ = ["FusedBlock", "FusionReport", "fuse", "unfuse"]
