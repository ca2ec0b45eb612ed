"""CIFAR from the files of its binary version."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.lab.data.samples import assert_standardised

from einlinear_lab.data import Augment, load_images
from einlinear_lab.data.images import cifar
from einlinear_lab.data.images.cifar import RECORDS

BATCHES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of 20 records instead of 10,000."""
    monkeypatch.setattr(cifar, "RECORDS", {name: count // 500 for name, count in RECORDS.items()})


def records(count: int, labels: int, seed: int) -> np.ndarray:
    """Coarse and fine labels, or only one, then 3,072 pixels."""
    values = np.random.default_rng(seed).integers(0, 256, (count, labels + 3072), dtype=np.uint8)
    values[:, 0] = np.arange(count) % 10
    if labels == 2:
        values[:, 1] = np.arange(count) % 100
    return values


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for i, name in enumerate((*BATCHES, "test_batch.bin")):
        records(20, 1, i).tofile(folder / name)
    return folder


@pytest.fixture
def cifar100(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    records(100, 2, 0).tofile(folder / "train.bin")
    records(20, 2, 1).tofile(folder / "test.bin")
    return folder


def pixels(x: torch.Tensor) -> torch.Tensor:
    """Standardised images -> their bytes again."""
    low, high = x.amin((0, 2, 3), keepdim=True), x.amax((0, 2, 3), keepdim=True)
    return ((x - low) / (high - low) * 255).round().byte()


def test_cifar_10(cifar10: Path) -> None:
    images = load_images(cifar10)
    assert images.name == "cifar-10"
    assert images.classes == cifar._VERSIONS[0].classes
    assert images.train_x.shape == (100, 3, 32, 32)
    assert images.test_x.shape == (20, 3, 32, 32)
    assert images.train_y.tolist() == 5 * [*range(10), *range(10)]
    expected = np.concatenate([records(20, 1, i)[:, 1:] for i in range(5)])
    assert torch.equal(pixels(images.train_x).flatten(1), torch.from_numpy(expected))
    assert "binary version at" in images.source
    assert_standardised(images)
    assert load_images(cifar10, image_size=8).size == (8, 8)
    augment = Augment.suited_to(images)
    assert (augment.shift, augment.flip) == (2, True)


def test_cifar_100_has_the_fine_labels(cifar100: Path) -> None:
    images = load_images(cifar100)
    assert images.name == "cifar-100"
    assert images.train_y.tolist() == list(range(100))
    assert images.classes == tuple(map(str, range(100)))
    assert torch.equal(pixels(images.train_x).flatten(1), torch.from_numpy(records(100, 2, 0)[:, 2:]))
    names = [f"kind {i}" for i in range(100)]
    (cifar100 / "fine_label_names.txt").write_text("\n".join(names) + "\n\n")
    assert load_images(cifar100).classes == tuple(names)
    (cifar100 / "fine_label_names.txt").write_text("apple\n")
    with pytest.raises(ValueError, match=r"fine_label_names\.txt names 1 classes, expected 100"):
        load_images(cifar100)


@pytest.mark.parametrize("name", [*BATCHES, "test_batch.bin"])
@pytest.mark.parametrize("cut", [1, 3073])
def test_a_truncated_file(name: str, cut: int, cifar10: Path) -> None:
    raw = (cifar10 / name).read_bytes()
    (cifar10 / name).write_bytes(raw[:-cut])
    message = rf"{name} holds [\d,]+ bytes, expected 61,460 \(20 records of 3,073, .*cifar-10.*\): it is truncated"
    with pytest.raises(ValueError, match=message):
        load_images(cifar10)


def test_files_of_something_else(cifar10: Path, cifar100: Path) -> None:
    (cifar100 / "test.bin").write_bytes(bytes(10**5))
    with pytest.raises(ValueError, match=r"test\.bin holds 100,000 bytes, expected 61,480 .*: it is of something else"):
        load_images(cifar100)
    values = records(20, 1, 0)
    values[7, 0] = 10
    values.tofile(cifar10 / "data_batch_2.bin")
    with pytest.raises(ValueError, match=r"data_batch_2\.bin is damaged: it has the label 10, expected 0 to 9"):
        load_images(cifar10)


def test_a_part_of_the_files(cifar10: Path) -> None:
    (cifar10 / "data_batch_4.bin").unlink()
    (cifar10 / "test_batch.bin").unlink()
    with pytest.raises(ValueError, match=r"a part of cifar-10: data_batch_4\.bin, test_batch\.bin is missing"):
        load_images(cifar10)


def test_the_pickled_version_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=r"holds the Python version of CIFAR, .* can run any code; give the binary"):
        load_images(tmp_path)
