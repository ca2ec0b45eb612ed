"""Batched matmuls: the order and the layouts (plan), and the products (backend)."""
