"""Batched matmuls: one strided matrix product per contraction step."""
