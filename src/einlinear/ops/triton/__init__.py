"""Kernels for NVIDIA GPUs.

triton_backend.py  the backend: forward and backward of a product
strided_steps.py   the plan: contraction steps with sizes and strides as numbers
launch.py          launches: memory, candidate tiles, arguments
tile_sizes.py      candidate tiles
slots.py           pairs of tokens and experts, sorted by expert
kernels.py         the kernels
"""
