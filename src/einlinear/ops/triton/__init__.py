"""Kernels for NVIDIA GPUs (docs/triton.md): plan and launches, and the kernels themselves."""
