"""Small data sets for the tests."""

import gzip
import importlib.util
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from einlinear_lab.data import Images

MakeFolder = Callable[..., Path]  # a fixture of conftest.py


def write_idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">{1 + values.ndim}I", 2048 + values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes(), compresslevel=1))


def write_fashion(folder: Path, train: int = 40, test: int = 20) -> None:
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("t10k", test)):
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", random.integers(0, 256, (count, 28, 28)))
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", np.arange(count) % 10)


def tiny(train: int = 50, classes: int = 5) -> Images:
    """Images whose every pixel is distinct within a channel, so that a moved pixel is noticed."""
    x = torch.arange(train * 2 * 6 * 4, dtype=torch.float32).view(train, 2, 6, 4)
    y = torch.arange(train) % classes
    return Images("tiny", "made up", x, y, x[:3].clone(), y[:3], tuple("abcdefgh"[:classes]))


def assert_standardised(images: Images) -> None:
    axes = (0, 2, 3)
    assert images.train_x.dtype == images.test_x.dtype == torch.float32
    assert images.train_y.dtype == images.test_y.dtype == torch.int64
    torch.testing.assert_close(images.train_x.mean(axes), torch.zeros(images.channels), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.train_x.std(axes, correction=0), torch.ones(images.channels))


def needs(module: str) -> pytest.MarkDecorator:
    """Skip tests without a package on a user's machine; where tests have to be complete, its absence is an error."""
    missing = importlib.util.find_spec(module) is None
    if missing and os.environ.get("CI") == "true":
        raise RuntimeError(f"{module} is not installed, so what needs it would go untested: pip install {module}")
    return pytest.mark.skipif(missing, reason=f"{module} is not installed")


def prose(lines: int, name: str = "text") -> str:
    """Lines that are all different, of common words."""
    words = [
        "all",
        "that",
        "he",
        "said",
        "and",
        "what",
        "she",
        "read",
        "of",
        "the",
        "old",
        "house",
        "by",
        "sea",
        "true",
    ]
    random = np.random.default_rng(0)
    return "".join(f"{name} {i}: {' '.join(random.choice(words, 8))}.\n" for i in range(lines))
