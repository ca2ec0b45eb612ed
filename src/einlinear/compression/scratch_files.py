"""Scratch files: copies of tensors that are mapped into memory. The system drops their pages if memory is short.

`from_pretrained` maps the weights of safetensors in the same way, unless it casts or moves them.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from torch import Tensor

# a tensor of fewer bytes gets no file of its own
_SMALL = 2**20


def copy_in_file(tensor: Tensor, folder: Path | None) -> Tensor:
    """Return a copy that lies in an unnamed file of a folder; OSError if the disk is full.

    Without a folder, the copy lies in memory; so do those of small tensors, and of tensors on other devices. Changes of
    the copy in place do not reach the file, which the system removes with the last tensor that uses it.
    """
    # other systems keep no file that is mapped and has no name
    if folder is None or os.name != "posix" or tensor.device.type != "cpu" or tensor.nbytes < _SMALL:
        return tensor.clone()
    values = tensor.detach().contiguous()
    content: Any = values.flatten().view(torch.uint8).numpy()
    try:
        with NamedTemporaryFile(dir=folder, suffix=".scratch") as file:
            file.write(content)
            file.flush()
            mapped = torch.from_file(file.name, shared=False, size=values.numel(), dtype=values.dtype)
    # a RuntimeError of torch if the file cannot be mapped
    except (OSError, RuntimeError) as error:
        raise OSError(f"{folder} cannot hold {values.nbytes:,} bytes more: {error}") from error
    return mapped.view(values.shape)
