"""Kernels for NVIDIA GPUs: the launches (executor), their layouts (steps), tiles (tiles) and code (kernels)."""
