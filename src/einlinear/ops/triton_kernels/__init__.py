"""Kernels for NVIDIA GPUs: the launches (executor), their layouts (steps), tiles (tile_sizes) and code (kernels)."""
