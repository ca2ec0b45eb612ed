"""Images for classification, held in memory.

Shapes: N images in a split, B in a batch, C channels, H x W pixels.
"""
