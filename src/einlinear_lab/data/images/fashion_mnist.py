"""Fashion-MNIST, from this machine or downloaded once as idx files."""

from __future__ import annotations

import gzip
import logging
import math
import shutil
import socket
import struct
import tempfile
import warnings
import zlib
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from einlinear.files import atomic
from einlinear_lab.data.images.dataset import Images
from einlinear_lab.data.paths import data_dir

logger = logging.getLogger(__name__)

CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
FILES = tuple(f"{split}-{kind}-ubyte.gz" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
_SCRIPT = "tools/fetch_fashion_mnist.sh"
# Of the Debian package.
SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")
# Seconds without an answer or a byte.
_DOWNLOAD_TIMEOUT = 5.0
# The magic number of idx files of unsigned bytes; the number of axes is added to it.
_IDX_BYTES = 0x0800


def read_fashion_mnist() -> Images:
    """Read Fashion-MNIST from this machine, or download it. Raises FileNotFoundError where neither works."""
    fetched = data_dir() / "fashion-mnist"
    for folder in (fetched, SYSTEM_FOLDER):
        if all((folder / name).is_file() for name in FILES):
            return _read(folder)
    try:
        _download(fetched)
    except (OSError, HTTPException) as error:
        raise FileNotFoundError(
            f"Fashion-MNIST is not on this machine and its download failed ({error}). Run {_SCRIPT} (Debian, no root), "
            f"or install the Debian package dataset-fashion-mnist, or try again with internet"
        ) from error
    return _read(fetched)


def _read(folder: Path) -> Images:
    paths, splits = [folder / name for name in FILES], list[Tensor]()
    for images, labels in (paths[:2], paths[2:]):
        x, y = _read_idx(images, ndim=3), _read_idx(labels, ndim=1)
        if len(x) != len(y):
            raise ValueError(f"{images} holds {len(x)} images, but {labels} {len(y)} labels")
        if y.max() >= len(CLASSES):
            raise ValueError(f"{labels}: label {int(y.max())}, expected 0 to 9")
        splits += [x.unsqueeze(1).float() / 255, y.long()]
    train_x, train_y, test_x, test_y = splits
    return Images("fashion-mnist", f"Fashion-MNIST, read from {folder}", train_x, train_y, test_x, test_y, CLASSES)


def _read_idx(path: Path, ndim: int) -> Tensor:
    again, expected = f"Delete it and fetch the data again ({_SCRIPT})", f"a gzipped idx file with {ndim} axes"
    try:
        with gzip.open(path) as file:
            magic, *shape = struct.unpack(f">{1 + ndim}I", file.read(4 + 4 * ndim))
            expected = f"{math.prod(shape)} bytes of data ({' x '.join(map(str, shape))})"
            body = bytearray(file.read())
    except (EOFError, OSError, struct.error, zlib.error) as error:
        raise ValueError(f"{path} is truncated or corrupt ({error}); expected {expected}. {again}") from error
    if magic != _IDX_BYTES + ndim:
        raise ValueError(f"{path} has the magic number {magic}, expected {_IDX_BYTES + ndim}. {again}")
    if len(body) != math.prod(shape) or not body:
        raise ValueError(f"{path} holds {len(body)} bytes of data, expected {expected}. {again}")
    return torch.frombuffer(body, dtype=torch.uint8).view(shape)


def _download(folder: Path) -> None:
    """Download Fashion-MNIST into `folder` as idx files, which load in seconds."""
    from sklearn.datasets import fetch_openml

    logger.info("Downloading Fashion-MNIST (about 30 MB) into %s", folder)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)
    try:
        with tempfile.TemporaryDirectory() as cache, warnings.catch_warnings():
            # Its errors say the same.
            warnings.simplefilter("ignore")
            # The default parser needs pandas.
            options = {"as_frame": False, "parser": "liac-arff", "n_retries": 1, "delay": 0.1}
            table = fetch_openml(name="Fashion-MNIST", version=1, data_home=cache, **options)
    finally:
        socket.setdefaulttimeout(timeout)
    # The rows are the 60,000 training images, then the 10,000 test images.
    x = np.asarray(table.data, dtype=np.uint8).reshape(70_000, 28, 28)
    y = np.asarray(table.target).astype(np.uint8)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Part of the files, which cannot be renamed over.
    shutil.rmtree(folder, ignore_errors=True)
    with atomic(folder) as scratch:
        scratch.mkdir()
        for name, values in zip(FILES, (x[:60_000], y[:60_000], x[60_000:], y[60_000:]), strict=True):
            with gzip.open(scratch / name, "wb", compresslevel=1) as file:
                file.write(struct.pack(f">{1 + values.ndim}I", _IDX_BYTES + values.ndim, *values.shape))
                file.write(values.tobytes())
