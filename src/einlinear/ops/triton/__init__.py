"""Kernels for NVIDIA GPUs: the launches (backend), their layouts (steps), tiles (tile_sizes) and code (kernels)."""
