"""CIFAR-10 and CIFAR-100, from a folder with the files of their binary version."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from einlinear_lab.data.images.dataset import Images

# The number of records of each file, by its stem.
RECORDS = {**dict.fromkeys(("data_batch", "test_batch", "test"), 10_000), "train": 50_000}
_PICKLES = ("data_batch_1", "test_batch", "batches.meta")


class _Version(NamedTuple):
    """The files of a data set. A record is its labels, a byte each, the last of which counts, then its pixels."""

    name: str
    train: tuple[str, ...]
    test: str
    labels: int
    names: str
    classes: tuple[str, ...]


_BATCHES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
_TEN = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_VERSIONS = (
    _Version("cifar-10", _BATCHES, "test_batch.bin", 1, "batches.meta.txt", _TEN),
    # Numbers, where its file of names is missing.
    _Version("cifar-100", ("train.bin",), "test.bin", 2, "fine_label_names.txt", tuple(map(str, range(100)))),
)


def read_cifar(folder: Path) -> Images | None:
    """Read CIFAR-10, or CIFAR-100 with its fine labels; return None for a folder without files named as theirs."""
    version = _version_of(folder)
    if version is None:
        if not any((folder / name).is_file() for name in _PICKLES):
            return None
        raise ValueError(
            f"{folder} holds the Python version of CIFAR, which is not read since loading a pickle can run any code; "
            "give the binary version (data_batch_1.bin and so on)"
        )
    missing = [name for name in (*version.train, version.test) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} holds a part of {version.name}: {', '.join(missing)} is missing")
    train_x, train_y = map(torch.cat, zip(*(_read(folder / name, version) for name in version.train)))
    test_x, test_y = _read(folder / version.test, version)
    source = f"{version.name}, the binary version at {folder}"
    return Images(version.name, source, train_x, train_y, test_x, test_y, _classes(folder, version))


def _version_of(folder: Path) -> _Version | None:
    ten, hundred = _VERSIONS
    if (folder / ten.train[0]).is_file():
        return ten
    # These names are common.
    return hundred if all((folder / name).is_file() for name in (*hundred.train, hundred.test)) else None


def _read(path: Path, version: _Version) -> tuple[Tensor, Tensor]:
    """Return (N, 3, 32, 32) float32 in [0, 1], and (N,) int64."""
    record = version.labels + 3 * 32 * 32
    records = RECORDS[path.stem.rstrip("_12345")]
    size = path.stat().st_size
    if size != records * record:
        problem = "truncated" if size < records * record else "of something else"
        raise ValueError(
            f"{path} holds {size:,} bytes, expected {records * record:,} ({records:,} records of {record:,}, those of "
            f"{version.name}'s binary version): it is {problem}"
        )
    values = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).view(records, record)
    labels = values[:, version.labels - 1].long()
    largest = len(version.classes) - 1
    if labels.max() > largest:
        raise ValueError(f"{path} is damaged: it has the label {int(labels.max())}, expected 0 to {largest}")
    return values[:, version.labels :].reshape(-1, 3, 32, 32).float() / 255, labels


def _classes(folder: Path, version: _Version) -> tuple[str, ...]:
    path = folder / version.names
    if not path.is_file():
        return version.classes
    names = tuple(filter(None, map(str.strip, path.read_text(encoding="utf-8").splitlines())))
    if len(set(names)) != len(version.classes):
        raise ValueError(f"{path} names {len(set(names))} classes, expected {len(version.classes)}")
    return names
