"""Compress a pretrained Hugging Face model: load, read text, compress, distill, save, time."""
